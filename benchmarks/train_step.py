"""`comigs bench train`: a device's training step beside PyTorch's, in one interleaved run.

The reference is what one would write today: `transformers`' GPT-2, every targeted linear map
wrapped in a module that adds the mixed LoRA deltas, autograd, AdamW. The base, the adapters,
the tokens and the update are the same on both sides; the losses are compared before anything is
timed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.device_step import (
    LEARNING_RATE,
    Step,
    device_step,
    fixed_adapters,
    fixed_text,
)
from edge_runtime.adapters import ROUTER
from edge_runtime.bundle import Bundle
from edge_runtime.errors import BaseModelError
from export.base import Base, load_base
from export.bundle import export_bundle
from export.mixture import GENERALIST, Mixture
from export.tiers import tiers

REFERENCE = "PyTorch eager float32"


class Row(TypedDict):
    """One contestant. Times in seconds; ratios are to the reference's step in the same turn."""

    name: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    loss: float
    peak_rss_mib: float | None


class Result(TypedDict):
    """What `comigs bench train --format json` prints."""

    workload: str
    threads: int
    steps: int
    versions: dict[str, str]
    rows: list[Row]


class MixedLinear(nn.Module):
    """A frozen map and the LoRA pairs of its experts: y = W x + sum_j p_j s B_j A_j x."""

    def __init__(self, frozen: nn.Module, pairs: list[tuple[Tensor, Tensor]], scale: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, scale
        self.a = nn.ParameterList(nn.Parameter(a.clone()) for a, _ in pairs)
        self.b = nn.ParameterList(nn.Parameter(b.clone()) for _, b in pairs)
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.frozen(x)
        for j, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            delta = F.linear(F.linear(x, a), b) * self.scale
            y = y + (delta if self.weights is None else self.weights[..., j : j + 1] * delta)
        return y


class RoutedMlp(nn.Module):
    """A GPT-2 MLP that routes its input before its two maps see it."""

    def __init__(self, mlp: Any, router: Tensor) -> None:
        super().__init__()
        self.mlp, self.router = mlp, nn.Parameter(router.clone())

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(F.linear(x, self.router), -1)
        self.mlp.c_fc.weights = self.mlp.c_proj.weights = weights  # top-2 of two experts
        y: Tensor = self.mlp(x)
        return y


def reference(base: Base, bundle: Bundle, tokens: Tensor, targets: Tensor) -> Step:
    """The step in PyTorch; two experts, so that top-2 routing is a softmax."""
    manifest = bundle.manifest
    adapters = {
        name: torch.from_numpy(view.copy()) for name, view in fixed_adapters(bundle)[1].items()
    }
    assert isinstance(base.config, GPT2Config)
    model = GPT2LMHeadModel(base.config)
    own_head = base.tensors.get("lm_head.weight", base.tensors["wte.weight"])
    model.lm_head.load_state_dict({"weight": own_head})
    model.transformer.load_state_dict(
        {k: v for k, v in base.tensors.items() if k != "lm_head.weight"}
    )
    model.requires_grad_(False)
    model.train(False)
    scale = manifest.mixture.alpha / manifest.mixture.rank**0.5
    roles = [role.name for role in manifest.roles if role.name != ROUTER]

    def mixed(frozen: Any, key: str, experts: Sequence[str]) -> MixedLinear:
        names = [f"{role}/transformer.{key}" for role in experts]
        pairs = [(adapters[f"{n}.lora_A.weight"], adapters[f"{n}.lora_B.weight"]) for n in names]
        return MixedLinear(frozen, pairs, scale)

    for layer, each in enumerate(model.transformer.h):
        block: Any = each
        block.attn.c_attn = mixed(block.attn.c_attn, f"h.{layer}.attn.c_attn", [GENERALIST])
        block.attn.c_proj = mixed(block.attn.c_proj, f"h.{layer}.attn.c_proj", [GENERALIST])
        block.mlp.c_fc = mixed(block.mlp.c_fc, f"h.{layer}.mlp.c_fc", roles)
        block.mlp.c_proj = mixed(block.mlp.c_proj, f"h.{layer}.mlp.c_proj", roles)
        router = adapters[f"{ROUTER}/transformer.h.{layer}.mlp.router.weight"]
        block.mlp = RoutedMlp(block.mlp, router)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def step() -> float:
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def run(
    *,
    base_name: str,
    random_weights: bool,
    batch: int,
    contestants: Sequence[tuple[str, str]],
    threads: int,
    steps: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Times the reference and each (engine, precision) of `contestants`, taking turns.

    Raises:
        BaseModelError: the base is not available, or no GPT-2.
        AssertionError: a contestant's loss is not the reference's, so it does other work.
    """
    torch.set_num_threads(threads)
    base = load_base(base_name, random_weights=random_weights)
    if not isinstance(base.config, GPT2Config):
        raise BaseModelError(f"{base_name} is no GPT-2, the only family this has a reference for")
    tier = replace(tiers()["laptop"], micro_batches=(batch,))
    with tempfile.TemporaryDirectory() as folder:
        bundles = {}
        for engine, precision in contestants:
            out = Path(folder) / f"{engine}-{precision}"
            bundles[engine, precision] = export_bundle(
                base,
                Mixture(),
                tier,
                engines=[engine],
                precision=precision,
                out=out,
                programs=("train_step",),
                progress=progress,
            )
        first = next(iter(bundles.values()))
        tokens, targets = map(torch.from_numpy, fixed_text(first, batch))
        progress("loading")
        steppers = {REFERENCE: reference(base, first, tokens, targets)}
        memory: dict[str, float | None] = {REFERENCE: None}
        for (engine, precision), bundle in bundles.items():
            name = f"{engine} {precision}"
            steppers[name] = device_step(bundle, engine, threads, batch)
            memory[name] = _peak_of_a_process(bundle, engine, threads, batch)
        losses = {name: step() for name, step in steppers.items()}
        for name, loss in losses.items():
            allowed = 0.01 if name.endswith("int8") else 1e-4
            wanted = losses[REFERENCE]
            assert abs(loss / wanted - 1) < allowed, f"{name}: loss {loss}, PyTorch's {wanted}"
        seconds = _take_turns(steppers, steps, progress)
    return {
        "workload": f"{base_name}{' (random weights)' if random_weights else ''}, one generalist "
        f"and one specialist of rank 8, per_linear, {batch} x {tier.train_length} tokens, all "
        "gradients and AdamW",
        "threads": threads,
        "steps": steps,
        "versions": {
            n: version(n) for n in ("torch", "transformers", *{engine for engine, _ in contestants})
        },
        "rows": [_row(name, seconds, losses, memory) for name in steppers],
    }


def _take_turns(
    steppers: dict[str, Step], steps: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(-2, steps):
        progress(f"step {max(turn, 0) + 1} of {steps}")
        for name, step in steppers.items():
            started = time.perf_counter()
            step()
            if turn >= 0:  # the first two warm up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _row(
    name: str,
    seconds: dict[str, list[float]],
    losses: dict[str, float],
    memory: dict[str, float | None],
) -> Row:
    own, theirs = seconds[name], next(iter(seconds.values()))
    ratios = [a / b for a, b in zip(own, theirs, strict=True)]

    def quartiles(values: list[float]) -> tuple[float, float]:
        low, _, high = quantiles(values, n=4)
        return low, high

    return {
        "name": name,
        "median": median(own),
        "quartiles": quartiles(own),
        "ratio": median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "loss": losses[name],
        "peak_rss_mib": memory[name],
    }


def _peak_of_a_process(bundle: Bundle, engine: str, threads: int, batch: int) -> float:
    """Largest resident set, in MiB, of a process that only trains."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.device_step"),
            *(str(bundle.path), engine, str(threads), str(batch)),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def table(result: Result) -> Any:
    """The rows for people; the interval is from the first to the third quartile."""
    from rich.table import Table

    view = Table(
        title=f"{result['workload']}; {result['threads']} threads, {result['steps']} steps"
    )
    view.add_column("training step")
    for heading in ("seconds", "of PyTorch's time", "peak memory"):
        view.add_column(heading, justify="right")
    for row in result["rows"]:
        low, high = row["quartiles"]
        ratio_low, ratio_high = row["ratio_quartiles"]
        view.add_row(
            row["name"],
            f"{row['median']:.3f} ({low:.3f}-{high:.3f})",
            f"{row['ratio']:.2f} ({ratio_low:.2f}-{ratio_high:.2f})",
            "" if row["peak_rss_mib"] is None else f"{row['peak_rss_mib']:.0f} MiB",
        )
    return view
