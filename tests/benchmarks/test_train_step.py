"""`comigs bench train` on the tiny base: it compares like with like, and reports both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.train_step import cosine


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime", "bench", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_step_is_compared_with_pytorch(tiny_llama_dir: Path) -> None:
    """With three experts tokens leave one out, and the balance loss has a gradient."""
    done = bench(
        *("--base", tiny_llama_dir, "--weights", "pretrained", "--batch", 2, "--length", 16),
        *("--steps", 4, "--engines", "onnxruntime,onnxruntime:int8", "--specialists", 2),
        *("--format", "json"),
    )
    assert done.returncode == 0, done.stderr
    assert "turn 4 of 4" in done.stderr.splitlines()  # without a terminal, a log
    result = json.loads(done.stdout)
    reference = result["reference"]
    rows = {(row["base_dtype"], row["variant"]): row for row in result["rows"]}
    ours, int8 = rows["float32", "standard"], rows["int8", "standard"]
    # What is done for less memory is compared like the rest, and so is what the router needs.
    assert {"recompute", "unpacked", "router"} <= {variant for _, variant in rows}
    assert all(row["loss"] == pytest.approx(reference["loss"], rel=0.01) for row in rows.values())
    # The same base, adapters and tokens: before the first update the losses are the same.
    assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    assert ours["gradient_cosine_min"] > 0.9999
    assert 0.9 < int8["gradient_cosine_min"] <= int8["gradient_cosine_mean"] < 1
    assert int8["engine"] == "onnxruntime"
    low, high = ours["time_ratio_spread"]
    assert 0 < low <= ours["time_ratio"] <= high
    # The reference's process has torch in it, ours has not.
    assert 10 < ours["peak_rss_mib"] < 200 < reference["peak_rss_mib"]
    assert 0 < ours["gemm_peak_share"] < 1
    assert (result["batch"], result["length"], result["turns"]) == (2, 16, 4)
    assert result["specialists"] == 2


@pytest.mark.parametrize("engine", ["onnxruntime:int3", "executorch:int3", "tensorrt"])
def test_an_unknown_engine_is_refused(tiny_base_dir: Path, engine: str) -> None:
    done = bench("--base", tiny_base_dir, "--engines", engine)
    assert done.returncode == 2
    assert engine.rpartition(":")[2] in done.stderr


def test_int4_is_refused_before_anything_runs(tiny_base_dir: Path) -> None:
    done = bench("--base", tiny_base_dir, "--engines", "onnxruntime,onnxruntime:int4")
    assert done.returncode == 2
    assert "int4 bundle is int8's; time onnxruntime:int8 instead" in done.stderr


def test_a_length_beyond_the_positions_is_refused(tiny_base_dir: Path) -> None:
    done = bench("--base", tiny_base_dir, "--length", 33)
    assert done.returncode == 2
    assert "32 positions" in done.stderr


def test_unknown_weights_are_refused(tiny_base_dir: Path) -> None:
    done = bench("--base", tiny_base_dir, "--weights", "rnd")
    assert done.returncode == 2
    assert "pretrained or random" in done.stderr


def test_the_cosine_of_a_gradient_that_is_none() -> None:
    zero, one, nan = np.zeros(3), np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 3.0])
    assert cosine(one, 2 * one) == pytest.approx(1)
    assert cosine(zero, zero) == 1
    assert [cosine(zero, one), cosine(one, zero), cosine(nan, one), cosine(one, nan)] == [0] * 4
