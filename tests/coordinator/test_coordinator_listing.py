"""`comigs rounds`, beside a running coordinator and after its end."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from coordinator_help import Fleet, header, join_round, train

from coordinator.backup import back_up, restore
from coordinator.state import DATABASE
from coordinator.tables import SCHEMA
from edge_runtime.errors import AdapterError, VersionError


def listed(state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coordinator", "rounds", "--state", str(state), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def rows(state: Path) -> list[dict[str, object]]:
    done = listed(state, "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rounds"]


def test_rounds_while_a_coordinator_runs_and_after_it_was_killed(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    state = fleet.directory / "a state?with #odd %41 name"
    options = ("--rounds", "2", "--aggregation", "median", "--clip-norm", "0.5")
    served = fleet.serve(bundle, *options, state=state)
    trio = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    waiting = {
        "cohort": "default",
        "round": 1,
        "status": "waiting",
        "participants": 0,
        "accepted": 0,
        "refused": 0,
    }
    quiet = {"paused": False, "rolled_back_to": None, "reason": None}
    quiet |= {"incoming_perplexity": None, "candidate_perplexity": None}
    quiet |= {"clipped": 0, "clipped_coordinates": 0}
    assert rows(state) == [waiting | {"seconds": None, "aggregation": None} | quiet]

    join_round(*trio)
    start = trio[0].download(1)
    assert not trio[2].upload(header(1), b"nonsense").accepted
    assert trio[0].upload(header(1), train(bundle, start, 0, 1)).accepted
    (one,) = rows(state)
    counts = {"participants": 3, "accepted": 1, "refused": 1}
    how = {"aggregation": "median, clipped to 0.5"}
    opened = waiting | {"status": "open", "seconds": None} | counts | how | quiet
    assert one | {"seconds": None} == opened
    assert one["seconds"] > 0
    assert trio[1].upload(header(1), train(bundle, start, 1, 1)).accepted
    join_round(*trio)
    served.kill()
    first, second = rows(state)
    assert (first["status"], first["accepted"], first["refused"]) == ("aggregated", 2, 1)
    assert (first["clipped"], first["clipped_coordinates"]) == (2, 0)
    assert (second["status"], second["accepted"]) == ("open", 0)

    # What was read above wrote nothing and kept nobody out; now for the last state of a round.
    again = fleet.serve(bundle, "--rounds", "2", "--deadline", "0.5", state=state)
    again.wait_for("round_abandoned", round=2)
    again.kill()
    closed, abandoned, third = rows(state)
    assert closed == first, "the clock of a closed round stands"
    assert abandoned["status"] == "abandoned"
    assert abandoned["aggregation"] == "mean", "as it was started the last time"
    assert abandoned["seconds"] > 0.5
    assert abandoned["reason"] == "too few updates at its deadline"
    assert third["status"] == "waiting"

    text = listed(state)
    assert text.returncode == 0
    lines = text.stdout.splitlines()
    assert lines[0].split() == [
        "cohort", "round", "status", "devices", "accepted", "refused", "seconds", "aggregation"
    ]  # fmt: skip
    assert lines[1].split() == [
        *("default", "1", "aggregated", "3", "2", "1", f"{first['seconds']:.1f}"),
        *("median,", "clipped", "to", "0.5;", "steps", "clipped:", "2"),
    ]
    assert lines[2].endswith("mean; too few updates at its deadline")
    assert lines[3].split() == ["default", "3", "waiting", "0", "0", "0"]


def test_a_state_on_a_disk_that_nobody_can_write(fleet: Fleet, tmp_path: Path) -> None:
    served = fleet.serve(fleet.bundle())
    served.ready()
    served.stop()
    shown = tmp_path / "shown"
    shown.mkdir()
    for options in (("--bind", str(fleet.state)), ("-o", "remount,ro,bind")):
        command = ["mount", *options, str(shown)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            subprocess.run(["umount", str(shown)], capture_output=True, check=False)
            pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        done = listed(shown)
        back_up(shown, tmp_path / "backup")
    finally:
        subprocess.run(["umount", str(shown)], check=True)
    assert done.returncode == 0, done.stderr
    assert "waiting" in done.stdout
    restore(tmp_path / "backup", tmp_path / "restored")


def test_a_state_of_another_version_is_told(fleet: Fleet) -> None:
    served = fleet.serve(fleet.bundle())
    served.ready()
    served.stop()
    for version, code in ((0, 0), (SCHEMA + 1, VersionError.code), (SCHEMA, 0)):
        with contextlib.closing(sqlite3.connect(fleet.state / DATABASE)) as connection:
            connection.execute(f"pragma user_version = {version}")
        done = listed(fleet.state)
        assert done.returncode == code, done.stderr
        assert ("by another version of comigs" in " ".join(done.stderr.split())) == (code != 0)


def test_what_is_no_state_is_told(tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "coordinator.sqlite3").write_bytes(b"x" * 5000)
    for state, code, message in (
        (tmp_path / "missing", 2, "holds no state of a coordinator"),
        (tmp_path, 2, "holds no state of a coordinator"),
        (tmp_path / "damaged", AdapterError.code, "not a database"),
    ):
        done = listed(state)
        assert done.returncode == code
        assert message in " ".join(done.stderr.replace("│", " ").split())
        assert "Traceback" not in done.stderr
        assert not done.stdout
    assert not (tmp_path / "missing").exists()
