"""A whole session as people run it: one coordinator and two devices, processes and TLS."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from google.protobuf import json_format

from coordinator.commands import TEXTS
from edge_runtime import wire
from edge_runtime.adapters import load_fresh
from edge_runtime.bundle import Bundle
from edge_runtime.store import Home
from protos import coordinator_pb2 as pb

ROUNDS, STEPS = 3, 2500
TRAINING = pb.TrainingConfig(
    rounds=ROUNDS, local_steps=STEPS, batch_sequences=2, tau=25, router_steps=5, weight_decay=0.01
)
NAMES = ("ada", "grace")


def comigs(*arguments: object, stdout: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edge_runtime", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Session:
    """A coordinator and two devices below `root`; each can be killed and started again."""

    def __init__(self, root: Path, bundle: Bundle, text: Path) -> None:
        self.root, self.bundle, self.text = root, bundle, text
        self.port, self.enrolment_port = free_port(), free_port()
        root.mkdir()
        self.training = root / "training.json"
        self.training.write_text(json_format.MessageToJson(TRAINING))
        self.coordinator = self.start_coordinator()
        admin = self.root / "coordinator" / "admin.json"
        invited = comigs("invite", *NAMES, "--admin", admin)
        lines, error = invited.communicate(timeout=60)
        assert invited.returncode == 0, error
        self.invitations = dict(zip(NAMES, lines.split(), strict=True))
        self.devices = {name: self.start_device(name) for name in NAMES}

    def start_coordinator(self) -> subprocess.Popen[str]:
        process = comigs(
            "serve",
            *("--bundle", self.bundle.path, "--state", self.root / "coordinator"),
            *("--listen", f"127.0.0.1:{self.port}", "--enrolment-port", self.enrolment_port),
            *("--rounds", ROUNDS, "--min-devices", 2),
            *("--training", self.training, "--exit-when-done", "--format", "json"),
        )
        assert process.stdout is not None
        self.coordinator_events = [json.loads(process.stdout.readline())]
        assert self.coordinator_events[0]["event"] == "listening"
        return process

    def start_device(self, name: str) -> subprocess.Popen[str]:
        # To a file: a pipe that nobody reads holds up who writes into it.
        with self.log(name).open("w") as log:
            return comigs(
                *("device", "run", "--invitation", self.invitations[name]),
                *("--home", self.root / name, "--data", self.text, "--bundle", self.bundle.path),
                *("--seed", NAMES.index(name), "--threads", 1, "--format", "json"),
                stdout=log,
            )

    def log(self, name: str) -> Path:
        return self.root / f"{name}.jsonl"

    def finish(self) -> dict[str, list[dict[str, object]]]:
        """Waits for everyone; returns each device's events."""
        events = {}
        for name, device in self.devices.items():
            _, error = device.communicate(timeout=240)
            assert device.returncode == 0, error
            events[name] = [json.loads(line) for line in self.log(name).read_text().splitlines()]
        lines, error = self.coordinator.communicate(timeout=90)
        assert self.coordinator.returncode == 0, error
        self.coordinator_events += map(json.loads, lines.splitlines())
        return events

    def vectors(self, name: str) -> dict[str, np.ndarray]:
        state, progress = Home(self.root / name).load_state(self.bundle)
        assert progress.finished
        assert state.expert_steps == ROUNDS * STEPS
        assert state.router_steps == ROUNDS * STEPS // 25 * 5
        return state.vectors


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Bundle, text_dir: Path
) -> tuple[Session, dict[str, list[dict[str, object]]]]:
    session = Session(tmp_path_factory.mktemp("session") / "s", tiny_bundle, text_dir)
    return session, session.finish()


def test_devices_end_with_one_generalist_and_their_own_specialists(
    undisturbed: tuple[Session, dict[str, list[dict[str, object]]]],
) -> None:
    session, events = undisturbed
    one, other = (session.vectors(name) for name in NAMES)
    fresh = load_fresh(session.bundle)
    np.testing.assert_array_equal(one["generalist"], other["generalist"])
    for role in ("specialist.1", "router"):
        assert not np.array_equal(one[role], other[role])
    for role, vector in one.items():
        assert not np.array_equal(vector, fresh[role]), f"{role} was not trained"
    for device in events.values():
        held_out = [e["loss"] for e in device if e["event"] == "held_out"]
        assert held_out[-1] < held_out[0]
        begun = [e for e in device if e["event"] == "round"]
        assert all(e["seconds_left"] > 0 for e in begun)


def documented(command: str) -> dict[str, tuple[set[str], set[str]]]:
    """What docs/json.md says of the events of a command: all their fields, and those that may be
    missing."""
    page = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
    section = page.split(f"\n## `{command}`\n")[1].split("\n## ")[0]
    events = {}
    for row in section.split("|---|---|---|\n")[1].splitlines():
        names, fields, _ = row.strip("|").split(" | ", 2)
        optional = re.findall(r"`(\w+)` \((?:only|if) ", fields)
        told = re.sub(r"\(.*?\)", "", fields)
        for name in re.findall(r"`(\w+)`", names):
            events[name] = ({"event", *re.findall(r"`(\w+)`", told)}, set(optional))
    return events


def test_events_are_as_documented(
    undisturbed: tuple[Session, dict[str, list[dict[str, object]]]],
) -> None:
    session, devices = undisturbed
    coordinator = documented("comigs serve")
    assert coordinator.keys() == TEXTS.keys()
    device = documented("comigs device run")
    said = [(coordinator, e) for e in session.coordinator_events]
    said += [(device, event) for events in devices.values() for event in events]
    assert {"round_closed", "summary"} <= {str(event["event"]) for _, event in said}
    for events, event in said:
        fields, optional = events[str(event["event"])]
        assert fields - optional <= event.keys() <= fields, event


def test_only_the_generalist_crosses_the_wire(
    undisturbed: tuple[Session, dict[str, list[dict[str, object]]]],
) -> None:
    session, events = undisturbed
    size = 4 * next(role.size for role in session.bundle.manifest.roles if role.shared)
    for device in events.values():
        network = next(e for e in device if e["event"] == "network")
        # A header per round and a few small calls come on top of the weights.
        assert ROUNDS * size <= network["bytes_sent"] < ROUNDS * (size + 8192)
        assert (ROUNDS + 1) * size <= network["bytes_received"] < (ROUNDS + 1) * (size + 8192)


def test_kills_change_nothing(
    undisturbed: tuple[Session, dict[str, list[dict[str, object]]]],
    tmp_path: Path,
    tiny_bundle: Bundle,
    text_dir: Path,
) -> None:
    """Devices and coordinator are killed again and again; the result is the same, bit for bit."""
    session = Session(tmp_path / "s", tiny_bundle, text_dir)
    rng, kills = random.Random(3), 0
    for _ in range(9):
        time.sleep(rng.uniform(0.2, 1.2))
        victim = rng.choice([*NAMES, "coordinator"])
        process = session.coordinator if victim == "coordinator" else session.devices[victim]
        if process.poll() is not None:
            continue
        process.send_signal(signal.SIGKILL)
        kills += 1
        process.communicate()
        if victim == "coordinator":
            session.coordinator = session.start_coordinator()
        else:
            session.devices[victim] = session.start_device(victim)
    assert kills >= 5, "the session was over before it was disturbed"
    session.finish()
    for name in NAMES:
        expected = undisturbed[0].vectors(name)
        for role, vector in session.vectors(name).items():
            np.testing.assert_array_equal(vector, expected[role], err_msg=f"{name} {role}")


def test_a_device_has_text_for_the_coordinators_batch(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """And not for the one that it would train with alone."""
    small = tmp_path / "small"
    small.mkdir()
    for split in ("train", "valid", "test"):
        (small / f"{split}.txt").write_text((text_dir / f"{split}.txt").read_text()[:60])
    training = tmp_path / "training.json"
    training.write_text('{"batch_sequences": 2, "local_steps": 3}')
    at = ("--home", tmp_path / "home", "--data", small, "--bundle", tiny_bundle.path)
    alone = comigs("device", "run", *at, "--alone")
    _, error = alone.communicate(timeout=60)
    assert alone.returncode == 12, error
    serve = ("--bundle", tiny_bundle.path, "--state", tmp_path / "state", "--listen", "127.0.0.1:0")
    rounds = ("--rounds", 1, "--min-devices", 1, "--training", training, "--insecure")
    with comigs("serve", *serve, *rounds, "--exit-when-done", "--format", "json") as coordinator:
        assert coordinator.stdout is not None
        address = json.loads(coordinator.stdout.readline())["address"]
        device = comigs(
            *("device", "run", *at, "--coordinator", address, "--insecure", "--format", "json")
        )
        told, error = device.communicate(timeout=60)
        assert device.returncode == 0, error
        assert [json.loads(line)["event"] for line in told.splitlines()].count("step") == 3
        coordinator.communicate(timeout=60)


def test_a_device_comes_back_for_more_rounds_and_from_being_alone(
    tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """Round numbers of one coordinator mean nothing to another, nor the end of its first rounds."""
    home, state = tmp_path / "home", tmp_path / "state"

    def comigs(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "edge_runtime", *map(str, arguments), "--format", "json"]

    def device(*arguments: object) -> list[str]:
        options = ("--home", home, "--data", text_dir, "--bundle", tiny_bundle.path)
        done = subprocess.run(
            comigs("device", "run", *options, "--threads", 1, *arguments),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return [event["event"] for event in map(json.loads, done.stdout.splitlines())]

    device("--alone", "--rounds", 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    for rounds in (1, 2, 3):
        options = ("--listen", address, "--rounds", rounds, "--min-devices", 1, "--insecure")
        serve = comigs("serve", "--bundle", tiny_bundle.path, "--state", state, *options)
        with subprocess.Popen(
            [*serve, "--exit-when-done"], stdout=subprocess.PIPE, text=True
        ) as coordinator:
            assert coordinator.stdout is not None
            # It says before that there are more rounds now.
            events = map(json.loads, coordinator.stdout)
            listening = next(event for event in events if event["event"] == "listening")
            assert listening["address"] == address
            happened = device("--coordinator", address, "--insecure")
            coordinator.stdout.read()
        assert coordinator.returncode == 0
        # The round's generalist and the final one, and a whole round in between.
        assert happened.count("downloaded") == 2, happened
        assert happened.count("step") == 10, happened
        final = max((state / "generalists").glob("*"), key=lambda f: int(f.name.split("-")[0]))
        trained, progress = Home(home).load_state(tiny_bundle)
        assert progress.schedule_start == 20, "else the learning rate is at its end already"
        vectors = trained.vectors
        decoded = wire.decode(tiny_bundle.manifest, final.read_bytes())
        assert (decoded["generalist"] == vectors["generalist"]).all()
