"""Devices tell nothing to a coordinator that does not keep to secure aggregation."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
from coordinator_help import Fleet, enrol_with, in_parallel, invited
from lying_coordinator import LIES
from masking_help import Masked, expected, joined, step_of, vector

from coordinator.administrator import Administrator
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.errors import RefusedError
from edge_runtime.secure_aggregation import DistrustedError
from edge_runtime.store import Home

PROGRAM = [sys.executable, str(Path(__file__).with_name("lying_coordinator.py"))]
OPTIONS = ("--secure-aggregation", "--min-devices", "3", "--secure-threshold", "0.6")
DEVICES = 5


def played(masker: Masked, step: np.ndarray) -> str:
    """Why the device refused; empty if it did not."""
    try:
        masker.run(step)
    except DistrustedError as error:
        return str(error)
    return ""


def revealed(state: Path) -> int:
    """Devices whose shares the coordinator has."""
    with sqlite3.connect(state / "coordinator.sqlite3") as connection:
        query = "select count(*) from masking_members where revealed is not null"
        return int(connection.execute(query).fetchone()[0])


def start_round(clients: list[Client]) -> int:
    return int(in_parallel(*(lambda c=c: joined([c]) for c in clients))[0])


def test_no_lie_makes_a_device_reveal_a_share(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    rounds = ("--rounds", str(len(LIES) + 2))
    served = fleet.serve(bundle, *OPTIONS, *rounds, program=[*PROGRAM, "2"])
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(DEVICES)))
    start = b""
    for place, complaint in enumerate(["", *LIES.values()]):
        number = start_round(clients)
        assert number == place + 1
        start = clients[0].download(number)
        maskers = [Masked(client, number) for client in clients]
        steps = [step_of(bundle, index, number) for index in range(DEVICES)]
        reasons = in_parallel(
            *(lambda m=m, s=s: played(m, s) for m, s in zip(maskers, steps, strict=True))
        )
        if not complaint:
            served.wait_for("round_closed", round=number)
            got = vector(bundle, clients[0].download(number + 1))
            exact = expected(vector(bundle, start), steps, group=DEVICES)
            np.testing.assert_array_equal(got, exact)
            continue
        refusing = [reason for reason in reasons if complaint in reason]
        assert len(refusing) == DEVICES, (place, reasons)
        assert not any(masker.revealed for masker in maskers)
        assert revealed(fleet.state) == 0
        with Administrator(served.administrator()) as administrator:
            administrator.abort("")
        assert clients[0].download(number + 1) == start, "nothing came of it"


def test_who_runs_a_device_is_told_of_the_lie(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """A device as people run it ends, and says why."""
    training = tmp_path / "training.json"
    training.write_text('{"local_steps": 2, "batch_sequences": 2}')
    options = (*OPTIONS, "--min-devices", str(DEVICES), "--training", str(training))
    served = fleet.serve(tiny_bundle, *options, program=[*PROGRAM, "1"])
    clients = fleet.enrolled(served, tiny_bundle, *(f"device {i}" for i in range(DEVICES - 1)))
    (invitation,) = invited(served, "ada")
    Home(tmp_path / "ada").save_identity(enrol_with(invitation, tiny_bundle))

    def others() -> list[str]:
        number = start_round(clients)
        maskers = [Masked(client, number) for client in clients]
        step = step_of(tiny_bundle, 0, number)
        return in_parallel(*(lambda m=m: played(m, step) for m in maskers))

    home = ("--home", tmp_path / "ada", "--data", text_dir, "--bundle", tiny_bundle.path)
    command = ("device", "run", *home, "--threads", 1, "--format", "json")
    ada, reasons = in_parallel(
        lambda: subprocess.run(
            [sys.executable, "-m", "edge_runtime", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        ),
        others,
    )
    assert all("it sums up too few" in reason for reason in reasons)
    assert ada.returncode == RefusedError.code, ada.stderr
    events = (json.loads(line) for line in ada.stdout.splitlines())
    (told,) = (event for event in events if event["event"] == "distrusted")
    assert told["round"] == 1
    assert "it sums up too few" in told["reason"], "with --min-devices 5, four are"
    assert "ask who runs it" in ada.stderr
    assert revealed(fleet.state) == 0
