"""Denormal numbers are zeros in programs, and nowhere else."""

import platform
import subprocess
import sys

import numpy as np
import pytest

from edge_runtime.bundle import Bundle
from edge_runtime.denormals import CAN_BE_FLUSHED, flushed

SMALL, TENTH = np.float32(1e-38), np.float32(0.1)

AFTER_A_RUN = """
import sys
from pathlib import Path
import numpy as np
from edge_runtime.bundle import open_bundle
from edge_runtime.engines import allocate, allocate_outputs, load_engine
small, tenth = np.float32(1e-38), np.float32(0.1)
bundle = open_bundle(Path(sys.argv[1]))
program = load_engine("onnxruntime", threads=2).load(bundle, "decode")
assert small * tenth > 0, "loading"
entry = bundle.program("decode", "onnxruntime")
inputs = allocate(entry.inputs)
program.bind(inputs, allocate_outputs(entry, inputs))()
assert small * tenth > 0, "running"
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="nothing is switched there"
)
def test_denormals_are_zeros_only_within() -> None:
    assert CAN_BE_FLUSHED
    with flushed():
        assert SMALL * TENTH == 0
        with pytest.raises(KeyError), flushed():
            raise KeyError
        assert SMALL * TENTH == 0
    assert SMALL * TENTH > 0


def test_a_program_leaves_the_arithmetic_of_python_as_it_was(tiny_bundle: Bundle) -> None:
    # In a process of its own: ONNX Runtime changes the thread that makes the first session.
    command = [sys.executable, "-c", AFTER_A_RUN, str(tiny_bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
