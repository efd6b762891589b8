"""Closes a round with a recipe: the updates on disk become the next generalist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from coordinator.aggregation.clipping import Clipped
from coordinator.aggregation.optimizers import Memory, ServerOptimizer
from coordinator.aggregation.ranks import Fitted
from coordinator.aggregation.recipe import Recipe
from coordinator.aggregation.staleness import Beginnings
from coordinator.aggregation.updates import Contribution, Flat, Layout, StoredUpdate, Update
from edge_runtime.adapters import Vectors
from edge_runtime.errors import AdapterError
from protos import manifest_pb2 as pb


class AggregationError(Exception):
    """The updates of a round amount to no usable generalist; the message is one line."""


@dataclass(frozen=True)
class Outcome:
    """What closing a round gives."""

    generalist: Vectors
    memory: bytes | None
    """Of the server optimizer, for the next round."""
    clipped: int
    """Updates that were longer than the recipe's norm."""
    clipped_coordinates: int = 0
    """Coordinates of masked steps that were beyond what whole numbers can say."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Device -> what it did to keep a sum of masked steps from being known, which it did not."""


def aggregate(
    manifest: pb.Manifest,
    recipe: Recipe,
    *,
    incoming: Vectors,
    contributions: Iterable[Contribution],
    memory: bytes | None = None,
) -> Outcome:
    """Closes a round.

    The same arguments give the same bytes, in whatever order the contributions are listed.

    Args:
        incoming: shared role -> float32 vector that the round starts from.
        memory: what the previous round's outcome had; that of another optimizer is ignored.

    Raises:
        DamagedUpdateError: the file of a contribution is missing or damaged.
        StorageError: it cannot be read now.
        AdapterError: so is the memory.
        AggregationError: too few contributions, or numbers beyond float32.
    """
    layout = Layout(manifest)
    try:
        strategy = recipe.strategy(layout)
    except ValueError as error:
        raise AggregationError(str(error)) from error
    ordered = sorted(contributions, key=lambda given: (given.staleness, given.device))
    if len(ordered) < strategy.least_updates:
        raise AggregationError(
            f"{recipe} needs {strategy.least_updates} updates or more, and there are {len(ordered)}"
        )
    updates = _Reader(manifest, layout)
    start = layout.flatten(incoming)
    beginnings = Beginnings(manifest, layout, start)
    # One thread: how many there are would decide how sums are rounded.
    with threadpool_limits(1):
        try:
            strategy.configure_round(start)
            for contribution in ordered:
                strategy.accept(beginnings.rebase(updates.read(contribution), contribution))
            flat = strategy.aggregate()
        except ValueError as error:  # of noise: the round has more updates than it promised
            raise AggregationError(str(error)) from error
    clipped = strategy.clipped if isinstance(strategy, Clipped) else 0
    return _conclude(layout, recipe, start, flat, memory, clipped)


def conclude_sum(
    manifest: pb.Manifest,
    recipe: Recipe,
    *,
    incoming: Vectors,
    total: Flat,
    divisor: int,
    clipped: int,
    clipped_coordinates: int,
    memory: bytes | None = None,
) -> Outcome:
    """Closes a round of which only the sum of the steps is known; else like `aggregate`.

    Args:
        total: sum of the steps from `incoming`, (D,).
        divisor: what makes a mean of it.
        clipped, clipped_coordinates: see Outcome.
    """
    layout = Layout(manifest)
    start = layout.flatten(incoming)
    outcome = _conclude(layout, recipe, start, start + total / divisor, memory, clipped)
    return replace(outcome, clipped_coordinates=clipped_coordinates)


def _conclude(
    layout: Layout, recipe: Recipe, start: Flat, flat: Flat, memory: bytes | None, clipped: int
) -> Outcome:
    """From what the updates amount to, `flat`, to the next generalist."""
    kept = None
    if recipe.optimizer is not None:
        moments = _restore(recipe.optimizer, memory, start.size)
        step, moments = recipe.optimizer.step(moments, flat - start)
        flat = start + step
        kept = _keep(recipe.optimizer, moments)
    with np.errstate(over="ignore"):
        result = flat.astype(np.float32)
    if not np.isfinite(result).all():
        raise AggregationError("the result has numbers beyond float32")
    return Outcome(generalist=layout.split(result), memory=kept, clipped=clipped)


class _Reader:
    """Gives contributions in the layout of the round, whatever their own."""

    def __init__(self, manifest: pb.Manifest, layout: Layout) -> None:
        self._wanted = layout
        self._layouts = {id(manifest): layout}

    def read(self, contribution: Contribution) -> Update:
        manifest = contribution.manifest
        if manifest is None:
            return StoredUpdate(self._wanted, contribution)
        if id(manifest) not in self._layouts:
            self._layouts[id(manifest)] = Layout(manifest)
        own = self._layouts[id(manifest)]
        update = StoredUpdate(own, contribution)
        return update if own is self._wanted else Fitted(update, own, self._wanted)


def _keep(optimizer: ServerOptimizer, moments: Memory) -> bytes:
    return save({f"{optimizer.name}.{name}": moment for name, moment in moments.items()})


def _restore(optimizer: ServerOptimizer, memory: bytes | None, size: int) -> Memory:
    """What `_keep` kept; a new beginning if that was another optimizer, or none."""
    initial = optimizer.initial(size)
    if memory is None:
        return initial
    try:
        kept = load(memory)
    except SafetensorError as error:
        raise AdapterError(
            f"the server optimizer's memory is damaged ({error}); restore the state directory "
            "from a copy, or start without --server-optimizer"
        ) from error
    if kept.keys() != {f"{optimizer.name}.{name}" for name in initial}:
        return initial
    return {name: kept[f"{optimizer.name}.{name}"] for name in initial}
