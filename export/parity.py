"""The parity gate: a compiled program is compared with PyTorch before it may be written.

The program runs through the device's own engine code, on random adapters of which nothing is
zero; every output, and so every gradient, is compared as a whole tensor. Tokens are random, too,
but with quantised weights they are prose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from edge_runtime.adapters import ROUTER, Stacks, views
from edge_runtime.bundle import Bundle
from edge_runtime.engines import Array, Engine, Program, allocate_outputs
from edge_runtime.errors import ParityError
from edge_runtime.memory import return_freed_memory
from edge_runtime.processor import cuts_sums, features
from export import mixture
from export.programs import BLOCKS, Specification
from protos import manifest_pb2 as pb

# Relative error of a whole tensor, on either engine: what the order of float32 sums explains, in
# most bases; where it explains more, see `_float32_noise`. A larger one has been an operator that
# is not the one that was asked for.
TOLERANCE = 1e-4
# What float32's uncertainty may excuse at most, also where PyTorch's own result is not finite.
MOST_NOISE = 0.01
# With quantised weights, against float32: losses, and anything else with eight bits or with four.
# This finds defects; it is no measure of quality: random adapters are harsher than trained ones.
LOSS_TOLERANCE, INT8_TOLERANCE, INT4_TOLERANCE = 0.03, 0.4, 0.8
# A router's gradient jumps where a token's second expert becomes its first; with more than two, any
# expert's does where the third becomes the second: of some hundred tokens, one was off by half.
JUMP_TOLERANCE = 0.8
LOSSES = ("loss", "cross_entropy", "losses")
# Of what adapters change in these outputs, with eight bits, where it is told best: in the outputs
# themselves it hides behind the base. Right programs were off by 0.3 at most, and one without the
# adapters of the MLP by 0.7; with four bits right ones are, too.
EFFECTS = ("logits", "losses")
EFFECT_TOLERANCE = 0.5

Outputs: TypeAlias = Mapping[str, Tensor]  # of PyTorch, by name
# Arguments, and PyTorch's outputs; perhaps the same with adapters that change nothing.
_Case: TypeAlias = tuple[Sequence[Tensor], Outputs, tuple[Sequence[Tensor], Outputs] | None]


def example_arguments(
    specification: Specification, manifest: pb.Manifest, seed: int, text: Array | None = None
) -> list[Tensor]:
    """Inputs in the program's order: tokens, a half-filled cache, non-zero adapters; random.

    Args:
        text: tokens to take instead of random ones, int64 (T,), repeated as need be.
    """
    rng = np.random.default_rng(seed)
    arguments = []
    value: np.ndarray
    for name, dtype, shape in specification.inputs:
        if name in ("tokens", "targets"):
            value = (
                rng.integers(0, manifest.base.vocabulary, shape)
                if text is None
                else np.resize(np.roll(text, -1 if name == "targets" else 0), shape)
            )
        elif name == "position":
            value = np.full(shape, _filled(specification, manifest))
        elif name == "last":
            value = np.full(shape, manifest.tier.prefill_chunk - 2)
        else:
            value = rng.normal(0.0, 1.0, shape)
        arguments.append(torch.from_numpy(value).to(dtype))
    vectors, stacks = mixture.random(manifest, seed), Stacks(manifest)
    named = views(manifest, vectors)
    stacks.fill(named)
    named |= stacks.arrays
    adapters = [torch.from_numpy(named[name].copy()) for name in specification.adapters]
    if specification.length:
        _fill_cache(specification, arguments, adapters)
    elif manifest.base.precision != "float32":
        _fill_cache_in_steps(specification, arguments, adapters)
    return [*arguments, *adapters]


def sample_text(tokenizer: Tokenizer) -> Array:
    """Tokens of some prose, int64 (T,).

    What a base does with random tokens nobody ever sees, and gradients through it can turn around
    with a rounding: those of SmolLM2 with int8 weights do.
    """
    prose = Path(__file__).with_name("sample_text.txt").read_text(encoding="utf-8")
    return np.array(tokenizer.encode(prose, add_special_tokens=False).ids, np.int64)


def _filled(specification: Specification, manifest: pb.Manifest) -> int:
    """Entries of the example's cache: half of it, or what a few runs of the program fill."""
    tokens = specification.inputs[0][2][0]
    of_noise = manifest.base.precision == "float32" or specification.length
    half = manifest.tier.context // 2
    return half if of_noise else min(half, 8 * tokens)


def _fill_cache(
    specification: Specification, arguments: list[Tensor], adapters: Sequence[Tensor]
) -> None:
    """Puts into the cache what the program itself would have put there, of the same tokens.

    Bases with massive activations keep them at position 0; without, all is noise to them, and what
    rounding does to noise says nothing.
    """
    names = [name for name, _, _ in specification.inputs]
    at = dict(zip(names, arguments, strict=True))
    count = int(at["position"])
    tokens = at["tokens"][torch.arange(count) % len(at["tokens"])]
    first = [
        tokens if n == "tokens" else torch.zeros_like(v) if n == "position" else v
        for n, v in at.items()
    ]
    results = specification.call(*first, *adapters)
    for name, value in zip(specification.outputs, results, strict=True):
        if name.startswith("updated."):
            arguments[names.index(name.replace("updated.", "cache.", 1))] = value


def _fill_cache_in_steps(
    specification: Specification, arguments: list[Tensor], adapters: Sequence[Tensor]
) -> None:
    """The same for a program of a fixed number of tokens, whose caller stores what is new."""
    at = dict(zip((name for name, _, _ in specification.inputs), arguments, strict=True))
    tokens = len(at["tokens"])
    filled = int(at["position"]) if "position" in at else 0
    for start in range(0, filled, tokens):
        first = [torch.full_like(v, start) if n == "position" else v for n, v in at.items()]
        results = specification.call(*first, *adapters)
        for name, value in zip(specification.outputs, results, strict=True):
            if name.startswith("new."):
                at[name.replace("new.", "cache.", 1)][:, start : start + tokens] = value


def variants(specification: Specification, arguments: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The arguments; if they may be of any number of tokens, those for a single one; and of
    programs that continue a text, those for its first tokens."""
    names = [name for name, _, _ in specification.inputs] + list(specification.adapters)
    named = list(zip(names, arguments, strict=True))
    found = [arguments]
    if specification.length:
        found.append([value[:1] if name == "tokens" else value for name, value in named])
    if "position" in names:
        zeros = [torch.zeros_like(value) if name == "position" else value for name, value in named]
        found.append(zeros)
    return found


class References:
    """What PyTorch says, kept for programs of the same function that are checked one after the
    other: a training step with all gradients takes it longer than a compiled one."""

    def __init__(self) -> None:
        self._specification: Specification | None = None
        self._arguments: Sequence[Tensor] = ()
        self._cases: list[_Case] = []

    def cases(
        self, specification: Specification, arguments: Sequence[Tensor], effects: Sequence[str]
    ) -> list[_Case]:
        """One for each of the `variants`; with `effects`, also without adapters."""
        if not self._have(specification, arguments, effects):
            self._specification = None
            self._cases = []  # before there are others
            for values in variants(specification, arguments):
                plain = _without_adapters(specification, values) if effects else None
                self._cases.append((values, _called(specification, values), plain))
            self._specification, self._arguments = specification, arguments
        names = specification.outputs
        return [
            (values, {name: outputs[name] for name in names}, plain if effects else None)
            for values, outputs, plain in self._cases
        ]

    def _have(
        self, wanted: Specification, arguments: Sequence[Tensor], effects: Sequence[str]
    ) -> bool:
        kept = self._specification
        return (
            kept is not None
            and (kept.function, kept.inputs, kept.adapters, kept.length)
            == (wanted.function, wanted.inputs, wanted.adapters, wanted.length)
            and set(wanted.outputs) <= set(kept.outputs)
            and (not effects or self._cases[0][2] is not None)
            and all(map(torch.equal, self._arguments, arguments))
        )


def check(
    specification: Specification,
    arguments: Sequence[Tensor],
    bundle: Bundle,
    engine: Engine,
    references: References | None = None,
) -> pb.Parity:
    """Runs the compiled program, in each of its forms that this processor is exact with, and the
    PyTorch one on the same arguments.

    Args:
        references: the same for programs that follow each other.

    Returns:
        What was found of the form that comes nearest to its tolerance.

    Raises:
        ParityError: an output, or what adapters change in it, differs by more than its tolerance,
            or is not finite.
    """
    entry = bundle.program(specification.name, engine.name)
    precision = bundle.manifest.base.precision
    eight_bits = precision != "float32" and specification.blocks != BLOCKS["int4"]
    effects = [name for name in EFFECTS if eight_bits and name in specification.outputs]
    # All of PyTorch's before the engine loads its weights: a large step needs memory for itself.
    cases = (references or References()).cases(specification, arguments, effects)
    return_freed_memory()
    found = []
    for unsigned in _forms(specification, entry):
        program = engine.load(bundle, entry.name, unsigned=unsigned)
        found.append(_judge(specification, entry, program, cases, precision, effects))
        del program  # before the next one is loaded
    return max(found, key=lambda each: each.worst_relative_error / each.tolerance)


def _forms(specification: Specification, entry: pb.Program) -> Sequence[bool]:
    """Whether to load the form with unsigned weights: those that this processor is exact with.

    Of a program that is a part of another's graph, that one's check sees the second form.
    """
    if not entry.unsigned_file:
        return (False,)
    if cuts_sums(features()):
        return (True,)
    return (False,) if specification.same_as else (False, True)


def _judge(
    specification: Specification,
    entry: pb.Program,
    program: Program,
    cases: Sequence[_Case],
    precision: str,
    effects: Sequence[str],
) -> pb.Parity:
    """Compares one form of a program; see `check`."""
    errors: dict[str, float] = {}
    allowed: dict[str, float] = {}
    least: dict[str, float] = {}
    for values, wanted, plain in cases:
        outputs = _run(entry, program, values, wanted)
        found = _errors(entry, values, outputs, wanted)
        tolerances = {name: _tolerance(name, specification, precision) for name in wanted}
        if plain is not None:
            bare = _run(entry, program, *plain)
            for name in effects:
                change = _relative_error(outputs[name] - bare[name], wanted[name] - plain[1][name])
                least[name] = min(change, least.get(name, change))
        if precision == "float32" and any(found[name] > tolerances[name] for name in wanted):
            noise = _float32_noise(specification, values, wanted)
            for name in wanted:
                tolerances[name] = max(tolerances[name], min(4.0 * noise[name], MOST_NOISE))
        for name in wanted:
            # Written so that a NaN counts.
            if name not in errors or not (
                found[name] / tolerances[name] <= errors[name] / allowed[name]
            ):
                errors[name], allowed[name] = found[name], tolerances[name]
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    judged = [(worst, errors[worst], allowed[worst])]
    for name, change in least.items():
        judged.append((f"what adapters change in {name}", change, EFFECT_TOLERANCE))
    for what, error, most in judged:
        if not error <= most:  # written so that a NaN fails too
            advice = (
                "this is a defect of the compiler or the engine, please report it"
                if precision == "float32"
                else f"{precision} is too coarse for this base, or the compiler is wrong; use "
                "--precision float32"
            )
            raise ParityError(
                f"{entry.name} compiled for {entry.engine} disagrees with PyTorch: {what} "
                f"is off by {error:.2e} relative (allowed {most:.0e}); nothing was written; "
                f"{advice}"
            )
    return pb.Parity(
        worst_relative_error=errors[worst],
        worst_output=worst,
        outputs=len(errors),
        tolerance=allowed[worst],
    )


def _called(specification: Specification, arguments: Sequence[Tensor]) -> Outputs:
    """PyTorch's outputs, by name."""
    return dict(zip(specification.outputs, specification.call(*arguments), strict=True))


def _without_adapters(
    specification: Specification, arguments: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Outputs]:
    """The same arguments with adapters that change nothing, and PyTorch's outputs for them."""
    names = [name for name, _, _ in specification.inputs] + list(specification.adapters)
    plain = [
        torch.zeros_like(value) if name.endswith(".lora_B.weight") else value
        for name, value in zip(names, arguments, strict=True)
    ]
    return plain, _called(specification, plain)


def _run(
    entry: pb.Program, program: Program, arguments: Sequence[Tensor], wanted: Outputs
) -> dict[str, Array]:
    """The compiled program's outputs, of the shapes of those that are wanted."""
    # Copies: what a program updates in place is another's input.
    inputs = {
        port.name: value.numpy().copy() for port, value in zip(entry.inputs, arguments, strict=True)
    }
    shapes = {name: tuple(want.shape) for name, want in wanted.items()}
    outputs = {
        name: _shortened(array, shapes[name])
        for name, array in allocate_outputs(entry, inputs).items()
    }
    program.bind(inputs, outputs)()
    return outputs


def _errors(
    entry: pb.Program,
    arguments: Sequence[Tensor],
    outputs: Mapping[str, Array],
    wanted: Outputs,
) -> dict[str, float]:
    new = _new_entries(
        {port.name: value.numpy() for port, value in zip(entry.inputs, arguments, strict=True)}
    )
    return {
        name: _relative_error(outputs[name][new], want[new])
        if name.startswith("updated.")
        else _relative_error(outputs[name], want)
        for name, want in wanted.items()
    }


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
    specification: Specification, arguments: Sequence[Tensor], results: Outputs
) -> dict[str, float]:
    """How far PyTorch's own `results` are from those in float64, relative.

    In a deep base whose activations reach tens of thousands, the order of sums shows: float32 tells
    some gradients of SmolLM2 to 1.6e-4 only.
    """
    exact_arguments = [a.double() if a.is_floating_point() else a for a in arguments]
    specification.base.double()
    try:
        exact = specification.call(*exact_arguments)
    finally:
        specification.base.float()
    return {
        name: _relative_error(result.numpy(), want)
        for (name, result), want in zip(results.items(), exact, strict=True)
    }


def _tolerance(output: str, specification: Specification, precision: str) -> float:
    if precision == "float32":
        return TOLERANCE
    if output in LOSSES:
        return LOSS_TOLERANCE
    experts = {name.split("/")[0] for name in specification.adapters} - {ROUTER}
    if output.startswith(f"grad:{ROUTER}/") or (output.startswith("grad:") and len(experts) > 2):
        return JUMP_TOLERANCE
    return INT4_TOLERANCE if specification.blocks == BLOCKS["int4"] else INT8_TOLERANCE


def _relative_error(got: np.ndarray, want: Tensor) -> float:
    reference = want.detach().double().numpy()
    scale = float(np.linalg.norm(reference))
    error = float(np.linalg.norm(got.astype(np.float64) - reference))
    if not np.isfinite(error):
        return float("inf")
    return error / scale if scale else error
