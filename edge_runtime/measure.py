"""How much memory programs need, measured in a fresh process: `python -m edge_runtime.measure`.

Prints one JSON object: `runtime_bytes`, the resident set with the engine imported and nothing
loaded, and `program_bytes`, its growth after the program was loaded and run twice (the second run
allocates what the first only plans).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from edge_runtime.bundle import open_bundle
from edge_runtime.engines import Engine, allocate, load_engine


def peak_bytes() -> int:
    """Largest resident set that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def import_engine(engine: Engine) -> None:
    """Imports what `engine` imports when it loads its first program."""
    if engine.name == "onnxruntime":
        import onnxruntime  # noqa: F401
    else:
        from executorch.runtime import Runtime

        Runtime.get()


def measure_here(bundle: Path, program: str, engine_name: str) -> dict[str, int]:
    opened = open_bundle(bundle)
    engine = load_engine(engine_name, threads=1)
    import_engine(engine)
    runtime = peak_bytes()
    entry = opened.program(program, engine_name)
    inputs = allocate(entry.inputs)
    for name, array in inputs.items():
        if array.dtype == np.float32:
            array[...] = 0.01  # touches the pages
        elif name == "last":
            array[...] = 1
    outputs = allocate(entry.outputs)
    call = engine.load(opened, program).bind(inputs, outputs)
    call()
    call()
    return {"runtime_bytes": runtime, "program_bytes": peak_bytes() - runtime}


def measure(bundle: Path, program: str, engine: str) -> dict[str, int]:
    """`measure_here` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime.measure", str(bundle), program, engine],
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("program")
    parser.add_argument("engine")
    arguments = parser.parse_args()
    print(json.dumps(measure_here(arguments.bundle, arguments.program, arguments.engine)))
