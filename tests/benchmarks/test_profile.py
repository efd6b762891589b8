"""`comigs bench profile` on the tiny base: the operators of both engines' programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_time_is_told_by_operator(tiny_base_dir: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "edge_runtime", "bench", "profile", "--base"),
            *(str(tiny_base_dir), "--weights", "pretrained", "--engines", "onnxruntime,executorch"),
            *("--calls", "3", "--format", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    for program in ("train_step.b1", "prefill", "decode"):
        onnx = [r for r in rows if (r["engine"], r["program"]) == ("onnxruntime", program)]
        timed = [r for r in onnx if r["operator"] != "between operators"]
        assert sum(r["share"] for r in onnx) == pytest.approx(1)
        # What is part of another operator is counted once: all of them take less than the run.
        assert all(r["milliseconds"] > 0 for r in onnx if r["calls"])
        assert next(r for r in onnx if r["operator"] == "between operators")["milliseconds"] > 0
        products = [r for r in timed if "MatMul" in r["operator"] or "Gemm" in r["operator"]]
        assert sum(r["calls"] for r in products) > 1
        xnnpack = [r for r in rows if (r["engine"], r["program"]) == ("executorch", program)]
        assert any(r["operator"] == "XNNPACK delegate" and r["calls"] >= 1 for r in xnnpack)
        assert all(r["milliseconds"] is None for r in xnnpack)
