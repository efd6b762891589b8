"""`comigs bench train` on the tiny base: it compares like with like, and reports both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime", "bench", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_step_is_compared_with_pytorch(tiny_base_dir: Path) -> None:
    done = bench(
        *("--base", tiny_base_dir, "--weights", "pretrained", "--batch", 2, "--steps", 4),
        *("--engines", "onnxruntime", "--format", "json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    reference, ours = result["rows"]
    # The same base, adapters and tokens: before the first update the losses are the same.
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    assert reference["ratio"] == 1.0
    assert ours["ratio"] == pytest.approx(ours["median"] / reference["median"], rel=0.9)
    assert 10 < ours["peak_rss_mib"] < 500
    assert result["steps"] == 4


@pytest.mark.parametrize("engine", ["onnxruntime:int3", "executorch:int8"])
def test_an_unknown_engine_is_refused(tiny_base_dir: Path, engine: str) -> None:
    done = bench("--base", tiny_base_dir, "--engines", engine)
    assert done.returncode == 2
    assert engine.partition(":")[2] in done.stderr


def test_unknown_weights_are_refused(tiny_base_dir: Path) -> None:
    done = bench("--base", tiny_base_dir, "--weights", "rnd")
    assert done.returncode == 2
    assert "pretrained or random" in done.stderr
