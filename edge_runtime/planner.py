"""What fits a memory budget, computed from the manifest before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

from edge_runtime.bundle import Bundle
from edge_runtime.errors import BudgetError, BundleError
from protos import manifest_pb2 as pb

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
# Per trainable number, beside what programs hold: two moments, and while a state is saved both and
# the value twice more, as tensors and as the file's content.
BYTES_PER_PARAMETER = 8 * 4
# Per number of the generalist, with a coordinator: what the round started from; and if updates are
# compressed what earlier ones left out and what this one started from, while a state is saved both
# twice more.
ROUND_BYTES, COMPRESSION_BYTES = 4, 6 * 4
# Libraries for text, network and progress, and a text of TEXT_BYTES: measured on a device, rounded
# up.
REST_BYTES = 80 * 2**20
TEXT_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Plan:
    """How a device will train. Sizes in bytes."""

    micro_batch: int
    recompute: bool
    """Whether activations are computed a second time instead of kept."""
    packed: bool
    """Whether the engine copies the weights into an order of its own."""
    together: bool
    """Whether training and evaluation are loaded side by side, or each makes room for the other."""
    runtime_bytes: int
    program_bytes: int
    adapter_bytes: int
    rest_bytes: int

    @property
    def program(self) -> str:
        return _program(self.micro_batch, self.recompute)

    @property
    def total_bytes(self) -> int:
        return self.runtime_bytes + self.program_bytes + self.adapter_bytes + self.rest_bytes


def parse_size(text: str) -> int:
    """Bytes in `text`, such as "512MiB", "1.5 GB" or "300000000 B".

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?b?|b)\s*", text.lower())
    if not match:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB or 1GB")
    return int(_finite(match[1]) * UNITS[match[2].removesuffix("b")])


def parse_seconds(text: str) -> float:
    """Seconds in `text`, such as "60s", "5m" or "90".

    Raises:
        ValueError: not a positive duration.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(s|m|min|h)?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a duration; write for example 60s or 5m")
    return _finite(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2] or "s"]


def _finite(digits: str) -> float:
    """The number, within what floats hold in any unit."""
    if (number := float(digits)) > 1e300:
        raise ValueError(f"{digits[:20]}... is too large")
    return number


def mebibytes(size: int) -> str:
    return f"{-(-size // 2**20)}MiB"


def for_rounds(*, compressed: bool = True) -> int:
    """Bytes that a number of the generalist takes besides, with a coordinator.

    Args:
        compressed: whether updates may be.
    """
    return ROUND_BYTES + (COMPRESSION_BYTES if compressed else 0)


def plans(
    bundle: Bundle,
    engine: str,
    batch_sequences: int,
    *,
    text_bytes: int = 0,
    shared_bytes: int = 0,
) -> list[Plan]:
    """Every way to train with this bundle that takes less memory than those before it.

    They come in the order of their speed. Small micro-batches, and programs that are loaded in
    turns, twice in a round, cost least. Computing activations twice costs less than reading weights
    where they are, with GPT-2 on an int8 base; with a float32 base the two are nearly equal
    (benchmarks/RESULTS.md).

    Args:
        text_bytes: that the text to train on takes, with its tokens.
        shared_bytes: see `for_rounds`; 0 without a coordinator.

    Raises:
        BundleError: the bundle cannot train with this engine.
        BudgetError: no micro-batch divides `batch_sequences`.
    """
    manifest = bundle.manifest
    if not all(manifest.tier.micro_batches):
        raise BundleError(f"{bundle.path} has a micro-batch of 0; copy the bundle again")
    sizes = [b for b in manifest.tier.micro_batches if batch_sequences % b == 0]
    if not sizes:
        raise BudgetError(
            f"no micro-batch of the bundle ({', '.join(map(str, manifest.tier.micro_batches))}) "
            f"divides a batch of {batch_sequences} sequences; change batch_sequences"
        )
    evaluation = bundle.program("eval_loss", engine)
    runtime = engine_cost(bundle, engine).runtime_bytes
    numbers = sum(role.size for role in manifest.roles)
    adapters = BYTES_PER_PARAMETER * numbers
    adapters += shared_bytes * sum(role.size for role in manifest.roles if role.shared)
    found: list[Plan] = []
    ways = product((True, False), (False, True), sorted(sizes, reverse=True), (True, False))
    for packed, recompute, size, together in ways:
        if recompute and not bundle.has_program(_program(size, recompute), engine):
            continue
        entries = (bundle.program(_program(size, recompute), engine), evaluation)
        needs = [e.memory_bytes if packed else e.unpacked_memory_bytes for e in entries]
        plan = Plan(
            micro_batch=size,
            recompute=recompute,
            packed=packed,
            together=together,
            runtime_bytes=runtime,
            program_bytes=sum(needs) if together else max(needs),
            # The gradient's sum over micro-batches. Together, programs count adapters twice.
            adapter_bytes=adapters + (0 if together or size == batch_sequences else 4 * numbers),
            rest_bytes=REST_BYTES + max(0, text_bytes - TEXT_BYTES),
        )
        if all(needs) and all(plan.total_bytes < other.total_bytes for other in found):
            found.append(plan)
    return found


def choose(
    bundle: Bundle,
    engine: str,
    batch_sequences: int,
    memory: int | None,
    *,
    text_bytes: int = 0,
    shared_bytes: int = 0,
) -> Plan:
    """The fastest plan within `memory` bytes (None: no limit).

    Args:
        text_bytes, shared_bytes: as of `plans`.

    Raises:
        BudgetError: nothing fits; says the smallest budget that would.
    """
    options = plans(
        bundle, engine, batch_sequences, text_bytes=text_bytes, shared_bytes=shared_bytes
    )
    for plan in options:
        if memory is None or plan.total_bytes <= memory:
            return plan
    assert memory is not None
    of_text = f", {mebibytes(text_bytes)} of it for the text" if text_bytes > TEXT_BYTES else ""
    raise BudgetError(
        f"training needs at least --memory {mebibytes(options[-1].total_bytes)} with this bundle "
        f"and engine{of_text}, the budget is {mebibytes(memory)}; raise it, or export for a "
        "smaller tier"
    )


def engine_cost(bundle: Bundle, engine: str) -> pb.EngineCost:
    """
    Raises:
        BundleError: the manifest has none.
    """
    for cost in bundle.manifest.engines:
        if cost.engine == engine:
            return cost
    raise BundleError(
        f"{bundle.path} does not say what engine {engine} costs; copy the bundle again"
    )


def _program(micro_batch: int, recompute: bool) -> str:
    return f"train_step.b{micro_batch}" + (".recompute" if recompute else "")
