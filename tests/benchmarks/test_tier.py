"""`comigs bench tier` on the tiny base, and that a tier's memory is held to."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.contest import Contestant, ContestError
from edge_runtime.errors import BudgetError
from export.tiers import device_classes, tiers

# A process of the benchmark that takes, and keeps, as many MiB as it is asked to.
GREEDY = """
from benchmarks.child import serve
kept = []
serve(lambda: {"take": lambda mib: kept.append(b"x" * (mib << 20))})
"""


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime", "bench", "tier", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_tier_runs_within_its_memory(tiny_base_dir: Path, tmp_path: Path) -> None:
    common = (
        *("--base", tiny_base_dir, "--weights", "pretrained", "--tiers", "phone-low"),
        *("--engines", "onnxruntime", "--turns", 2, "--cache", tmp_path),
    )
    done = bench(*common, "--format", "json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["refused"] == []
    limit = device_classes()["phone-low"].memory_mib
    assert row["memory_limit_mib"] == limit
    suggesting, training = row["suggesting"], row["training"]
    assert 0 < suggesting["token_p50"] <= suggesting["token_p95"]
    assert suggesting["cold_start"] > 0.1
    for measured in (suggesting, training):
        assert 10 < measured["peak_rss_mib"] <= measured["planned_mib"] < limit
    assert training["step_seconds"] > 0
    assert row["bundle_mib"] > 0.1
    assert 100 < row["exporting"]["peak_rss_mib"] < 4096
    assert row["exporting"]["processor_seconds"] > 1

    done = bench(*common, "--format", "csv")
    assert done.returncode == 0, done.stderr
    (line,) = csv.DictReader(io.StringIO(done.stdout))
    assert line["tier"] == "phone-low"
    assert float(line["suggesting.token_p95"]) > 0
    assert float(line["training.planned_mib"]) == training["planned_mib"]


def test_an_unknown_tier_is_refused(tiny_base_dir: Path) -> None:
    done = bench("--base", tiny_base_dir, "--tiers", "mainframe")
    assert done.returncode == 2
    assert "mainframe" in done.stderr
    assert "wearable" in done.stderr


def test_every_tier_says_what_it_stands_for() -> None:
    classes = device_classes()
    assert list(classes) == ["wearable", "phone-low", "phone-mid", "phone-high", "laptop"]
    assert all(each.why and each.threads >= 1 for each in classes.values())
    memory = [each.memory_mib for each in classes.values()]
    contexts = [tier.context for tier in tiers().values()]
    assert memory == sorted(memory)
    assert contexts == sorted(contexts)


def test_a_process_beyond_its_limit_is_ended() -> None:
    command = [sys.executable, "-c", GREEDY]
    with Contestant("modest", command, limit=200 << 20) as modest:
        modest.ask("take", 10)
        assert 10 < modest.ask("peak") < 200
    with (
        pytest.raises(BudgetError, match="greedy needs more than 200 MiB"),
        Contestant("greedy", command, limit=200 << 20) as greedy,
    ):
        greedy.ask("take", 300)


def test_a_contestant_does_not_outlive_a_killed_benchmark(tmp_path: Path) -> None:
    benchmark = f"""
import os, signal, sys
from pathlib import Path
from benchmarks.contest import Contestant
contestant = Contestant("idle", [sys.executable, "-c", {GREEDY!r}])
print(contestant._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", benchmark], capture_output=True, text=True, timeout=60, check=False
    )
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(10)


def test_a_contestant_that_fails_says_why() -> None:
    with (
        pytest.raises(ContestError, match="broken ended with 1 and said: KeyError: 'nothing'"),
        Contestant("broken", [sys.executable, "-c", GREEDY]) as broken,
    ):
        broken.ask("nothing")
