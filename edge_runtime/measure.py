"""How much memory programs need, measured in a fresh process: `python -m edge_runtime.measure`.

Prints a JSON object per program: `runtime_bytes`, the resident set with the engine imported and
nothing loaded, and `program_bytes`, its growth after the program was loaded and run. The process
imports the engine once and forks for each program; a child's peak starts at what it inherits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.engines import Engine, allocate, allocate_outputs, load_engine
from edge_runtime.memory import peak_bytes


def measure_here(bundle: Bundle, program: str, engine: Engine, packed: bool) -> dict[str, int]:
    runtime = peak_bytes()
    entry = bundle.program(program, engine.name)
    inputs = allocate(entry.inputs)
    for name, array in inputs.items():
        if array.dtype == np.float32:
            array[...] = 0.01  # touches the pages
        elif name == "last":
            array[...] = 1
    outputs = allocate_outputs(entry, inputs)
    # Of the form that most devices load, whatever this processor wants.
    loaded = engine.load(bundle, program, packed=packed, unsigned=False)
    call = loaded.bind(inputs, outputs)
    call()
    if engine.name == "onnxruntime":
        call()  # allocates what the first run only plans; ExecuTorch's plan is in its program
    return {"runtime_bytes": runtime, "program_bytes": peak_bytes() - runtime}


def measure(
    bundle: Path, programs: Sequence[str], engine: str, *, packed: bool = True
) -> list[dict[str, int]]:
    """`measure_here` for each of `programs`, each in a process of its own, one after the other."""
    if not programs:
        return []
    command = [sys.executable, "-m", "edge_runtime.measure", str(bundle), engine, *programs]
    done = subprocess.run(
        command if packed else [*command, "--unpacked"],
        check=True,
        capture_output=True,
        text=True,
    )
    # What else there is, the engine printed.
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("engine")
    parser.add_argument("programs", nargs="+")
    parser.add_argument("--unpacked", action="store_true")
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    engine = load_engine(arguments.engine, threads=1)
    engine.library()
    for program in arguments.programs:
        child = os.fork()  # no thread runs yet
        if child == 0:
            print(
                json.dumps(measure_here(bundle, program, engine, not arguments.unpacked)),
                flush=True,
            )
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{program} ended with status {status}")


if __name__ == "__main__":
    main()
