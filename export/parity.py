"""The parity gate: a compiled program is compared with PyTorch before it may be written.

The program runs through the device's own engine code, on random adapters of which nothing is
zero; every output, and so every gradient, is compared as a whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from edge_runtime.adapters import views
from edge_runtime.bundle import Bundle
from edge_runtime.engines import Array, Engine, allocate_outputs
from edge_runtime.errors import ParityError
from export import mixture
from export.programs import Specification
from protos import manifest_pb2 as pb

# Relative error of a whole tensor, on either engine: what the order of float32 sums explains, in
# most bases; where it explains more, see `_float32_noise`. A larger one has been an operator that
# is not the one that was asked for.
TOLERANCE = 1e-4
# What float32's uncertainty may excuse at most, also where PyTorch's own result is not finite.
MOST_NOISE = 0.01
# With an int8 base, against the float32 one: losses, and anything else. This finds defects; it is
# no measure of quality, for random tokens, adapters and caches are harsher than text. Gradients of
# routers of gpt2-mini are off by up to 0.23, what SmolLM2 stores in the last of its thirty
# blocks by 0.47 and its losses by 0.02, though its perplexity on text is float32's within 0.1 %.
INT8_LOSS_TOLERANCE, INT8_TOLERANCE = 0.03, 0.6
LOSSES = ("loss", "cross_entropy", "losses")


def example_arguments(
    specification: Specification, manifest: pb.Manifest, seed: int
) -> list[Tensor]:
    """Random inputs in the program's order: tokens, a half-filled cache, non-zero adapters."""
    rng = np.random.default_rng(seed)
    arguments = []
    value: np.ndarray
    for name, dtype, shape in specification.inputs:
        if name in ("tokens", "targets"):
            value = rng.integers(0, manifest.base.vocabulary, shape)
        elif name == "position":
            value = np.full(shape, manifest.tier.context // 2)
        elif name == "last":
            value = np.full(shape, manifest.tier.prefill_chunk - 2)
        else:
            value = rng.normal(0.0, 1.0, shape)
        arguments.append(torch.from_numpy(value).to(dtype))
    adapters = views(manifest, mixture.random(manifest, seed))
    return [*arguments, *(torch.from_numpy(adapters[t.name].copy()) for t in manifest.tensors)]


def check(
    specification: Specification,
    arguments: Sequence[Tensor],
    bundle: Bundle,
    engine: Engine,
) -> pb.Parity:
    """Runs the compiled program and the PyTorch one on the same arguments.

    Raises:
        ParityError: an output differs by more than its tolerance, or is not finite.
    """
    entry = bundle.program(specification.name, engine.name)
    wanted = dict(zip(specification.outputs, specification.call(*arguments), strict=True))
    # Copies: what a program updates in place is another's input.
    inputs = {
        port.name: value.numpy().copy() for port, value in zip(entry.inputs, arguments, strict=True)
    }
    outputs = allocate_outputs(entry, inputs)
    if specification.length:
        shapes = {name: tuple(want.shape) for name, want in wanted.items()}
        outputs = {name: _shortened(array, shapes[name]) for name, array in outputs.items()}
    engine.load(bundle, specification.name).bind(inputs, outputs)()
    new = _new_entries(inputs)
    errors = {
        name: _relative_error(outputs[name][new], want[new])
        if name.startswith("updated.")
        else _relative_error(outputs[name], want)
        for name, want in wanted.items()
    }
    precision = bundle.manifest.base.precision
    allowed = {name: _tolerance(name, precision) for name in wanted}
    if precision == "float32" and any(errors[name] > allowed[name] for name in wanted):
        noise = _float32_noise(specification, arguments, wanted)
        allowed = {name: max(allowed[name], min(4.0 * noise[name], MOST_NOISE)) for name in wanted}
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    # Written so that a NaN fails too.
    if not errors[worst] <= allowed[worst]:
        advice = (
            "this is a defect of the compiler or the engine, please report it"
            if precision == "float32"
            else "eight bits are too few for this base's activations, use --precision float32"
        )
        raise ParityError(
            f"{specification.name} compiled for {engine.name} disagrees with PyTorch: {worst} is "
            f"off by {errors[worst]:.2e} relative (allowed {allowed[worst]:.0e}); nothing was "
            f"written; {advice}"
        )
    return pb.Parity(
        worst_relative_error=errors[worst],
        worst_output=worst,
        outputs=len(errors),
        tolerance=allowed[worst],
    )


def _shortened(array: Array, shape: tuple[int, ...]) -> Array:
    return array if array.shape == shape else np.zeros(shape, array.dtype)


def _new_entries(inputs: Mapping[str, Array]) -> tuple[slice, ...]:
    """Where an updated cache (1, K, C, D) is not the old one; compared as a whole, it would hide
    behind that."""
    if "position" not in inputs:
        return ()
    start = int(inputs["position"][0])
    return (slice(None), slice(None), slice(start, start + inputs["tokens"].size))


def _float32_noise(
    specification: Specification, arguments: Sequence[Tensor], results: Mapping[str, Tensor]
) -> dict[str, float]:
    """How far PyTorch's own `results` are from those in float64, relative.

    In a deep base whose activations reach tens of thousands, the order of sums shows: float32 tells
    some gradients of SmolLM2 to 1.6e-4 only.
    """
    exact_arguments = [a.double() if a.is_floating_point() else a for a in arguments]
    specification.base.double()
    exact = specification.call(*exact_arguments)
    specification.base.float()
    return {
        name: _relative_error(result.numpy(), want)
        for (name, result), want in zip(results.items(), exact, strict=True)
    }


def _tolerance(output: str, precision: str) -> float:
    if precision != "int8":
        return TOLERANCE
    return INT8_LOSS_TOLERANCE if output in LOSSES else INT8_TOLERANCE


def _relative_error(got: np.ndarray, want: Tensor) -> float:
    reference = want.detach().double().numpy()
    scale = float(np.linalg.norm(reference))
    error = float(np.linalg.norm(got.astype(np.float64) - reference))
    if not np.isfinite(error):
        return float("inf")
    return error / scale if scale else error
