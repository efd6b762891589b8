"""`comigs models`: which generalists there are, and how far apart."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coordinator_help import Fleet, header, join_round, train

from coordinator.listing import reading
from coordinator.models import of_cohort
from edge_runtime import wire


def models(state: Path) -> list[dict[str, Any]]:
    done = listed(state, "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["models"]


def listed(state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coordinator", "models", "--state", str(state), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_generalists_of_aggregated_and_abandoned_rounds(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "1", "--rounds", "5")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    contents = []
    for number in (1, 2):
        join_round(ada)
        contents.append(ada.download(number))
        assert ada.upload(header(number), train(bundle, contents[-1], 0, number)).accepted
    join_round(ada)
    contents.append(ada.download(3))
    served.kill()
    again = fleet.serve(bundle, "--min-devices", "1", "--rounds", "5", "--deadline", "0.2")
    again.wait_for("round_abandoned", round=3)

    rows = models(fleet.state)
    assert [row["number"] for row in rows] == [1, 2, 3], "the fourth round starts as the third did"
    assert [row["current"] for row in rows] == [False, False, True]
    assert [row["bytes"] for row in rows] == [len(content) for content in contents]
    assert rows[0]["made_at"] is None
    assert rows[0]["step"] is None
    assert rows[1]["made_at"] < rows[2]["made_at"]
    vectors = [wire.decode(bundle.manifest, content)["generalist"] for content in contents]
    for before, after, row in zip(vectors, vectors[1:], rows[1:], strict=False):
        step = np.linalg.norm(after.astype(np.float64) - before.astype(np.float64))
        assert row["step"] == pytest.approx(step, rel=1e-12)

    with reading(fleet.state) as session:
        latest = of_cohort(session, fleet.state, rows[0]["cohort"], 2)
    assert [vars(found) for found in latest] == rows[1:]

    (lost,) = (fleet.state / "generalists").glob("2-*")
    lost.unlink()
    lines = listed(fleet.state).stdout.splitlines()
    assert lines[0].split() == ["cohort", "round", "made", "bytes", "step", "SHA-256"]
    assert lines[1].split()[1:] == [
        *("1", "by", "the", "bundle", f"{len(contents[0]):,}", "-", rows[0]["sha256"][:16])
    ]
    assert lines[2].split()[4:6] == ["-", "-"], "its file is gone"
    assert lines[3].endswith("*")
    assert listed(fleet.directory / "none").returncode == 2
