"""`comigs bench profile`: where the time goes of a training step, a prompt and a decoded token.

ONNX Runtime's own profiler, summed by operator, in a process of its own. ExecuTorch's wheel is
built without its event tracer, so of its programs there is only what is called how often.

    python -m benchmarks.profile BUNDLE ENGINE THREADS PROGRAM CALLS
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from benchmarks.child import Commands, serve
from benchmarks.machine import Machine, machine
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.engines import allocate, allocate_outputs, load_engine, shortened

PROMPT = 128  # tokens, before the decoded one
SHOWN = 12  # operators; the rest is one row


class Row(TypedDict):
    """One operator of a program: calls in a run, and their time. `share` is of all operators'."""

    engine: str
    weights: str
    program: str
    operator: str
    calls: int
    milliseconds: float | None
    share: float | None


class Result(TypedDict):
    """What `comigs bench profile --format json` prints."""

    benchmark: str
    base: str
    weights: str
    threads: int
    machine: Machine
    versions: dict[str, str]
    rows: list[Row]


def run(
    *,
    base_name: str,
    random_weights: bool,
    contestants: Sequence[tuple[str, str]],
    threads: int,
    calls: int,
    cache: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Profiles `train_step.b1`, `prefill` and `decode` of each (engine, precision).

    Raises:
        BaseModelError: the base is not available.
        ContestError: a program failed.
    """
    # Not above: the process that is profiled needs no compiler.
    from benchmarks.compiled import Compiler, kept_in
    from benchmarks.contest import Contestant
    from export.base import load_base
    from export.tiers import tiers

    base = load_base(base_name, random_weights=random_weights)
    laptop = tiers()["laptop"].fitted(base.architecture.positions)
    one = replace(laptop, micro_batches=(1,))
    rows: list[Any] = []
    with ExitStack() as stack:
        folder = stack.enter_context(kept_in(cache))
        compiler = Compiler(base=base, folder=folder, progress=progress)
        for engine, precision in contestants:
            for program, tier, kinds in (
                ("train_step.b1", one, ("train_step",)),
                ("prefill", laptop, ("prefill", "decode")),
                ("decode", laptop, ("prefill", "decode")),
            ):
                bundle = compiler.bundle(tier, engine=engine, precision=precision, programs=kinds)
                progress(f"profiling {program} of {engine} {precision}")
                command = [sys.executable, "-m", "benchmarks.profile", str(bundle.path), engine]
                command += [str(threads), program, str(calls)]
                with Contestant(f"{engine} {precision} {program}", command) as each:
                    operators = each.ask("operators")
                who = {"engine": engine, "weights": precision, "program": program}
                rows += [{**who, **operator} for operator in operators]
    return {
        "benchmark": "profile",
        "base": base_name,
        "weights": "random" if random_weights else "pretrained",
        "threads": threads,
        "machine": machine(),
        "versions": {n: version(n) for n in {engine for engine, _ in contestants}},
        "rows": rows,
    }


def table(result: Result) -> Any:
    """For people: every program's operators, the most expensive first."""
    from rich.table import Table

    view = Table("program", "operator", "calls", "ms", "share", title=result["base"])
    for row in result["rows"]:
        view.add_row(
            f"{row['engine']} {row['weights']} {row['program']}",
            row["operator"],
            str(row["calls"]),
            "" if row["milliseconds"] is None else f"{row['milliseconds']:.2f}",
            "" if row["share"] is None else f"{row['share']:.0%}",
        )
    return view


# --- the process that is profiled ------------------------------------------------------------


def onnx_operators(bundle: Bundle, threads: int, program: str, calls: int) -> list[dict[str, Any]]:
    """Operators of a program under ONNX Runtime, as the device runs it."""
    import onnxruntime

    class Profiled(onnxruntime.SessionOptions):  # type: ignore[misc]
        """The engine's own options, and the profiler."""

        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True

    onnxruntime.SessionOptions = Profiled
    prompt = min(PROMPT, bundle.manifest.tier.context // 2)
    length, position = (1, prompt) if program == "decode" else (prompt, 0)
    entry = shortened(bundle.program(program, "onnxruntime"), length)
    inputs = allocate(entry.inputs)
    rng = np.random.default_rng(0)
    for name, array in inputs.items():
        if array.dtype == np.float32:
            array[...] = rng.normal(0.0, 0.02, array.shape)
        elif name == "position":
            array[...] = position
    outputs = allocate_outputs(entry, inputs)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where the profiler writes
        loaded: Any = load_engine("onnxruntime", threads=threads).load(bundle, program)
        call = loaded.bind(inputs, outputs)
        for _ in range(3 + calls):
            call()
        events = json.loads(Path(loaded.session.end_profiling()).read_text())
        os.chdir("/")
    runs = [event for event in events if event["name"] == "model_run"][3:]
    kernels = [
        event
        for event in events
        if event["name"].endswith("_kernel_time") and event["ts"] >= runs[0]["ts"]
    ]
    seconds: Counter[str] = Counter()
    count: Counter[str] = Counter()
    around: list[tuple[str, int]] = []  # operators of which others are part, and when they end
    for event in sorted(kernels, key=lambda event: (event["ts"], -event["dur"])):
        while around and event["ts"] >= around[-1][1]:
            around.pop()
        if around:
            seconds[around[-1][0]] -= event["dur"]
        operator = event["args"]["op_name"]
        seconds[operator] += event["dur"]
        count[operator] += 1
        around.append((operator, event["ts"] + event["dur"]))
    total = sum(run["dur"] for run in runs)
    rows = [
        {
            "operator": operator,
            "calls": count[operator] // calls,
            "milliseconds": spent / calls / 1e3,
            "share": spent / total,
        }
        for operator, spent in seconds.most_common(SHOWN)
    ]
    rest = [operator for operator, _ in seconds.most_common()[SHOWN:]]
    between = (total - sum(seconds.values())) / calls / 1e3
    for name, spent, number in (
        (
            "other operators",
            sum(seconds[o] for o in rest) / calls / 1e3,
            sum(count[o] for o in rest),
        ),
        ("between operators", between, 0),
    ):
        share = spent * 1e3 * calls / total
        rows.append(
            {"operator": name, "calls": number // calls, "milliseconds": spent, "share": share}
        )
    return rows


def executorch_operators(bundle: Bundle, program: str) -> list[dict[str, Any]]:
    """What an ExecuTorch program calls: XNNPACK's parts as a whole, and kernels beside them."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    entry = bundle.program(program, "executorch")
    content = deserialize_pte_binary(bundle.file(entry.file).read_bytes())
    plans = getattr(content, "program", content).execution_plan
    plan = next(plan for plan in plans if plan.name == entry.method)
    count: Counter[str] = Counter()
    for instruction in plan.chains[0].instructions:
        what = instruction.instr_args
        if isinstance(what, DelegateCall):
            count["XNNPACK delegate"] += 1
        elif isinstance(what, KernelCall):
            count[plan.operators[what.op_index].name] += 1
    return [
        {"operator": operator, "calls": number, "milliseconds": None, "share": None}
        for operator, number in count.most_common(SHOWN)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("engine")
    parser.add_argument("threads", type=int)
    parser.add_argument("program")
    parser.add_argument("calls", type=int)
    given = parser.parse_args()

    def operators() -> list[dict[str, Any]]:
        bundle = open_bundle(given.bundle.absolute())
        if given.engine == "onnxruntime":
            return onnx_operators(bundle, given.threads, given.program, given.calls)
        return executorch_operators(bundle, given.program)

    def load() -> Commands:
        return {"operators": operators}

    serve(load)


if __name__ == "__main__":
    main()
