"""`comigs bench train`: a device's training step beside PyTorch's, in one interleaved run.

Every contestant is a process of its own and has its turn while the others stand still. The base,
the adapters, the tokens and the update are the same; before anything is timed the losses are
compared, and every gradient with PyTorch's. What counts as work for `gemm_peak_share` is what the
step needs: the frozen products forward and once backward, attention, and the LoRA products.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any, TypedDict

import numpy as np
from safetensors.numpy import load_file

from benchmarks.compiled import Compiler, kept_in
from benchmarks.contest import Contestant, WrongOptionError, quartiles, turns
from benchmarks.machine import Machine, machine
from edge_runtime.bundle import Bundle
from edge_runtime.errors import ParityError
from export.base import Base, load_base
from export.mixture import Mixture
from export.tiers import tiers

REFERENCE = "PyTorch eager float32"
Spread = tuple[float, float]


class Row(TypedDict):
    """One program of an engine and base type.

    `variant` is `standard`, or what is done for less memory: `recompute`, activations computed
    twice; `unpacked`, weights read where they are; or `router`, a step of the router alone, still
    beside the whole one. Ratios are to the reference's step in the same turn; spreads are first and
    third quartile; cosines are to PyTorch's gradient, tensor by tensor.
    `gemm_peak_share` is of the products' peak in the base's own type, float32 or int8.
    """

    engine: str
    base_dtype: str
    variant: str
    time_ratio: float
    time_ratio_spread: Spread
    seconds: float
    seconds_spread: Spread
    peak_rss_mib: float
    gradient_cosine_min: float
    gradient_cosine_mean: float
    gradient_worst: str
    gemm_peak_share: float
    loss: float


class Reference(TypedDict):
    """The step in PyTorch."""

    name: str
    seconds: float
    seconds_spread: Spread
    peak_rss_mib: float
    gemm_peak_share: float
    loss: float


class Result(TypedDict):
    """What `comigs bench train --format json` prints."""

    benchmark: str
    base: str
    weights: str
    batch: int
    length: int
    specialists: int
    threads: int
    turns: int
    machine: Machine
    limits: dict[str, float]
    versions: dict[str, str]
    reference: Reference
    rows: list[Row]


def run(
    *,
    base_name: str,
    random_weights: bool,
    batch: int,
    length: int,
    specialists: int,
    contestants: Sequence[tuple[str, str]],
    threads: int,
    steps: int,
    cache: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Times the reference and each (engine, precision) of `contestants`, taking turns.

    Raises:
        BaseModelError: the base is not available.
        WrongOptionError: the base has fewer positions than `length`.
        ParityError: a contestant's loss is not the reference's, so it does other work.
    """
    base = load_base(base_name, random_weights=random_weights)
    positions = base.architecture.positions
    if length > positions:
        raise WrongOptionError(
            "--length", f"{base_name} has {positions} positions, {length} tokens are too many"
        )
    tier = replace(tiers()["laptop"], micro_batches=(batch,), train_length=length)
    weights = "random" if random_weights else "pretrained"
    with ExitStack() as stack:
        folder = stack.enter_context(kept_in(cache))
        compiler = Compiler(base=base, folder=folder, progress=progress)
        bundles = {
            (engine, precision): compiler.bundle(
                tier,
                engine=engine,
                precision=precision,
                mixture=Mixture(specialists=specialists),
                programs=("train_step", "router_step"),
            )
            for engine, precision in contestants
        }
        progress("loading")
        first = next(iter(bundles.values()))

        def start(name: str, module: str, *arguments: object) -> Contestant:
            command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
            return stack.enter_context(Contestant(name, command))

        everyone = {
            REFERENCE: start(
                REFERENCE, "reference_step", base_name, weights, first.path, batch, threads
            )
        }
        rows = [
            (engine, precision, entry.name, packed)
            for (engine, precision), bundle in bundles.items()
            for entry in bundle.manifest.programs
            for packed in ((True, False) if entry.unpacked_memory_bytes else (True,))
            # One row tells what the router's own step saves.
            if packed or not entry.name.startswith("router_step")
            if entry.name != f"router_step.b{batch}.recompute"
        ]
        for engine, precision, program, packed in rows:
            variant = variant_of(program, packed)
            everyone[f"{engine} {precision} {variant}"] = start(
                f"{engine} {precision} {variant}",
                "device_process",
                *("train", bundles[engine, precision].path, engine, threads, program),
                *(() if packed else ("--unpacked",)),
            )
        machine_limits = start("limits", "limits", threads)
        losses = {name: each.ask("step")[1] for name, each in everyone.items()}
        _compare_losses(losses)
        cosines = _cosines(everyone, folder)
        seconds: dict[str, list[float]] = {name: [] for name in everyone}
        dtypes = ("float32", *({"int8"} & {precision for _, precision in contestants}))
        limits = {f"{dtype}_gflops": 0.0 for dtype in dtypes}
        for counts in turns(steps, progress):
            for dtype in dtypes:  # the best of all turns: one look may fall into a slow moment
                key = f"{dtype}_gflops"
                limits[key] = max(limits[key], machine_limits.ask("gemm", dtype))
            for name, each in everyone.items():
                taken = each.ask("step")[0]
                if counts:
                    seconds[name].append(taken)
        peaks = {name: each.ask("peak") for name, each in everyone.items()}
    work = step_gflop(base, first, batch)

    def share(name: str, dtype: str) -> float:
        peak: float = limits[f"{dtype}_gflops"]
        return work / median(seconds[name]) / peak

    def row(engine: str, precision: str, program: str, packed: bool) -> Row:
        variant = variant_of(program, packed)
        name = f"{engine} {precision} {variant}"
        ratios = [a / b for a, b in zip(seconds[name], seconds[REFERENCE], strict=True)]
        worst = min(cosines[name], key=lambda tensor: cosines[name][tensor])
        return {
            "engine": engine,
            "base_dtype": precision,
            "variant": variant,
            "time_ratio": median(ratios),
            "time_ratio_spread": quartiles(ratios),
            "seconds": median(seconds[name]),
            "seconds_spread": quartiles(seconds[name]),
            "peak_rss_mib": peaks[name],
            "gradient_cosine_min": cosines[name][worst],
            "gradient_cosine_mean": mean(cosines[name].values()),
            "gradient_worst": worst,
            "gemm_peak_share": share(name, precision),
            "loss": losses[name],
        }

    return {
        "benchmark": "train",
        "base": base_name,
        "weights": weights,
        "batch": batch,
        "length": length,
        "specialists": specialists,
        "threads": threads,
        "turns": steps,
        "machine": machine(),
        "limits": limits,
        "versions": {
            n: version(n) for n in ("torch", "transformers", *{engine for engine, _ in contestants})
        },
        "reference": {
            "name": REFERENCE,
            "seconds": median(seconds[REFERENCE]),
            "seconds_spread": quartiles(seconds[REFERENCE]),
            "peak_rss_mib": peaks[REFERENCE],
            "gemm_peak_share": share(REFERENCE, "float32"),
            "loss": losses[REFERENCE],
        },
        "rows": [row(*each) for each in rows],
    }


def variant_of(program: str, packed: bool) -> str:
    """What sets a program, and how it is loaded, apart from others for the same batch."""
    kind, _, *parts = program.split(".")
    parts += ["router"] if kind == "router_step" else []
    return " ".join([*parts, *([] if packed else ["unpacked"])]) or "standard"


def step_gflop(base: Base, bundle: Bundle, batch: int) -> float:
    """10^9 multiplications and additions of a step, two for each weight and token and product.

    A frozen map takes part twice, in the output and in the gradient of its input, an adapter's
    three times; attention's two products are T x T per head, and have two gradients each.
    """
    a = base.architecture
    length = bundle.manifest.tier.train_length
    frozen = a.layers * sum(m.inputs * m.outputs for m in a.maps) + a.vocabulary * a.width
    adapters = sum(role.size for role in bundle.manifest.roles)
    attention = a.layers * 3 * 2 * length * a.heads * a.head_dim
    return 2 * batch * length * (2 * frozen + 3 * adapters + attention) / 1e9


def _compare_losses(losses: dict[str, float]) -> None:
    wanted = losses[REFERENCE]
    for name, loss in losses.items():
        if not abs(loss / wanted - 1) < (0.01 if " int8 " in name else 1e-4):
            raise ParityError(f"{name} has the loss {loss}, PyTorch {wanted}; nothing was timed")


def _cosines(everyone: dict[str, Contestant], folder: Path) -> dict[str, dict[str, float]]:
    """Contestant -> tensor -> cosine of its gradient to the reference's, after the same steps."""
    path = folder / "gradients.safetensors"
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for name, each in everyone.items():
        each.ask("gradients", str(path))
        gradients = load_file(path)
        found[name] = {key: value.astype(np.float64).ravel() for key, value in gradients.items()}
        path.unlink()
    wanted = found.pop(REFERENCE)

    return {
        name: {key: cosine(gradients[key], wanted[key]) for key in gradients}
        for name, gradients in found.items()
    }


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Of two vectors (D,); of two that are zero 1, and 0 if one is, or holds a NaN."""
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if lengths == (0.0, 0.0):
        return 1.0
    if 0.0 in lengths or not np.isfinite(lengths).all():
        return 0.0
    return float(a @ b) / (lengths[0] * lengths[1])


def table(result: Result) -> Any:
    """The rows for people; the interval is from the first to the third quartile."""
    from rich.table import Table

    view = Table(
        title=f"{result['base']} ({result['weights']} weights), {result['batch']} x "
        f"{result['length']} tokens, {result['specialists']} specialists; "
        f"{result['threads']} threads, {result['turns']} turns"
    )
    view.add_column("training step")
    headings = ("seconds", "of PyTorch's time", "peak memory", "worst gradient", "of GEMM peak")
    for heading in headings:
        view.add_column(heading, justify="right")

    def interval(value: float, spread: Spread, digits: int) -> str:
        return f"{value:.{digits}f} ({spread[0]:.{digits}f}-{spread[1]:.{digits}f})"

    reference = result["reference"]
    view.add_row(
        reference["name"],
        interval(reference["seconds"], reference["seconds_spread"], 3),
        "1",
        f"{reference['peak_rss_mib']:.0f} MiB",
        "",
        f"{reference['gemm_peak_share']:.0%}",
    )
    for row in result["rows"]:
        view.add_row(
            f"{row['engine']} {row['base_dtype']}"
            + (f", {row['variant']}" if row["variant"] != "standard" else ""),
            interval(row["seconds"], row["seconds_spread"], 3),
            interval(row["time_ratio"], row["time_ratio_spread"], 2),
            f"{row['peak_rss_mib']:.0f} MiB",
            f"{row['gradient_cosine_min']:.4f}",
            f"{row['gemm_peak_share']:.0%}",
        )
    return view
