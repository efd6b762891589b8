"""Secure aggregation as people run it: all as processes, some of them killed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from google.protobuf import json_format

from edge_runtime import wire
from edge_runtime.bundle import Bundle
from edge_runtime.store import Home
from protos import coordinator_pb2 as pb

NAMES = ("ada", "grace", "edith", "mary")
ROUNDS = 2
TRAINING = pb.TrainingConfig(rounds=ROUNDS, local_steps=150, batch_sequences=2, tau=50)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def comigs(*arguments: object, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_runtime", *map(str, arguments), "--format", "json"]
    with log.open("a") as out, log.with_suffix(".err").open("a") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, text=True)


def events(log: Path) -> list[dict[str, object]]:
    """What was said so far; the last line may be half written."""
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]]


def wait_for(log: Path, event: str, **fields: object) -> dict[str, object]:
    end = time.monotonic() + 90
    while True:
        for found in events(log):
            if found["event"] == event and fields.items() <= found.items():
                return found
        assert time.monotonic() < end, f"no {event} in {log}: {log.with_suffix('.err').read_text()}"
        time.sleep(0.02)


def test_a_coordinator_that_comes_back_with_another_training(
    tmp_path: Path, tiny_bundle: Bundle, text_dir: Path
) -> None:
    """Devices that were in the middle of the old one train again, with what all are told now."""
    training = tmp_path / "training.json"
    listen = f"127.0.0.1:{free_port()}"

    def serve(local_steps: int, log: str) -> subprocess.Popen[str]:
        asked = pb.TrainingConfig(rounds=1, local_steps=local_steps, batch_sequences=2, tau=50)
        training.write_text(json_format.MessageToJson(asked))
        return comigs(
            *("serve", "--bundle", tiny_bundle.path, "--state", tmp_path / "state"),
            *("--listen", listen, "--secure-aggregation", "--min-devices", 3),
            *("--rounds", 1, "--training", training, "--exit-when-done"),
            log=tmp_path / log,
        )

    first = serve(100, "first.log")
    admin = wait_for(tmp_path / "first.log", "listening")["admin"]
    assert comigs("invite", *NAMES[:3], "--admin", admin, log=tmp_path / "invite.log").wait(60) == 0
    made = json.loads((tmp_path / "invite.log").read_text())["invitations"]
    devices = [
        comigs(
            *("device", "run", "--home", tmp_path / each["name"], "--data", text_dir),
            *("--bundle", tiny_bundle.path, "--threads", 1, "--invitation", each["invitation"]),
            log=tmp_path / f"{each['name']}.log",
        )
        for each in made
    ]
    for each in made:
        wait_for(tmp_path / f"{each['name']}.log", "step", round=1)
    first.kill()
    first.wait()
    second = serve(7, "second.log")
    assert wait_for(tmp_path / "second.log", "round_closed", round=1)["updates"] == 3
    for device, each in zip(devices, made, strict=True):
        assert device.wait(120) == 0, (tmp_path / f"{each['name']}.err").read_text()
    assert second.wait(90) == 0
    for each in made:
        said = events(tmp_path / f"{each['name']}.log")
        assert [event["event"] for event in said].count("round") == 2
        again = max(index for index, event in enumerate(said) if event["event"] == "round")
        assert sum(event["event"] == "step" for event in said[again:]) == 7


def test_devices_that_are_killed_drop_out_or_go_on(
    tmp_path: Path, tiny_bundle: Bundle, text_dir: Path
) -> None:
    training = tmp_path / "training.json"
    training.write_text(json_format.MessageToJson(TRAINING))
    state = tmp_path / "state"
    serve = comigs(
        *("serve", "--bundle", tiny_bundle.path, "--state", state, "--listen", "127.0.0.1:0"),
        *("--secure-aggregation", "--min-devices", 4, "--secure-threshold", 0.75),
        *("--clip-norm", 0.05, "--stage-seconds", 60),
        *("--rounds", ROUNDS, "--training", training, "--exit-when-done"),
        log=tmp_path / "serve.log",
    )
    admin = wait_for(tmp_path / "serve.log", "listening")["admin"]
    inviting = tmp_path / "invite.log"
    assert comigs("invite", *NAMES, "--admin", admin, log=inviting).wait(60) == 0
    invitations = {
        made["name"]: made["invitation"] for made in json.loads(inviting.read_text())["invitations"]
    }

    def start(name: str) -> subprocess.Popen[str]:
        return comigs(
            *("device", "run", "--home", tmp_path / name, "--data", text_dir),
            *("--bundle", tiny_bundle.path, "--threads", 1, "--invitation", invitations[name]),
            "--require-secure-aggregation",
            log=tmp_path / f"{name}.log",
        )

    devices = {name: start(name) for name in NAMES}
    # In training: it takes up where it was, keys and all, and the round waits for it.
    wait_for(tmp_path / "ada.log", "step", round=1)
    devices["ada"].send_signal(signal.SIGKILL)
    devices["ada"].wait()
    devices["ada"] = start("ada")
    # After its masked step has come: the others reveal what it takes, and it is summed up.
    wait_for(tmp_path / "grace.log", "masked", round=1)
    devices["grace"].send_signal(signal.SIGKILL)
    devices["grace"].wait()
    closed = wait_for(tmp_path / "serve.log", "round_closed", round=1)
    assert closed["updates"] == 4
    assert closed["clipped"] == 4, "150 steps of this size are longer than 0.05"
    devices["grace"] = start("grace")
    for name, device in devices.items():
        assert device.wait(120) == 0, (tmp_path / f"{name}.err").read_text()
    assert serve.wait(90) == 0, (tmp_path / "serve.err").read_text()

    said = [event["event"] for event in events(tmp_path / "serve.log")]
    assert said.count("round_closed") == ROUNDS
    assert "update_refused" not in said
    final = max((state / "generalists").glob("*"), key=lambda file: int(file.name.split("-")[0]))
    generalist = wire.decode(tiny_bundle.manifest, final.read_bytes())["generalist"]
    for name in NAMES:
        vectors = Home(tmp_path / name).load_state(tiny_bundle)[0].vectors
        np.testing.assert_array_equal(vectors["generalist"], generalist)
