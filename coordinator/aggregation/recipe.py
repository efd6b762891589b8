"""A choice of strategy, clipping and server optimizer, and a round that is closed with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from coordinator.aggregation.clipping import Clipped
from coordinator.aggregation.means import Mean
from coordinator.aggregation.optimizers import Adam, Memory, Momentum, ServerOptimizer, Yogi
from coordinator.aggregation.robust import Krum, Median, TrimmedMean
from coordinator.aggregation.updates import Contribution, Layout, StoredUpdate, Strategy
from edge_runtime.adapters import Vectors
from edge_runtime.errors import AdapterError
from protos import manifest_pb2 as pb

MEANS: dict[str, Callable[[], Strategy]] = {
    "mean": Mean,
    "token-mean": lambda: Mean(by_tokens=True),
    "median": Median,
}
# These are told how many updates of a round may be malicious.
AGAINST: dict[str, Callable[[int], Strategy]] = {
    "trimmed-mean": TrimmedMean,
    "krum": Krum,
    "multi-krum": lambda malicious: Krum(malicious, multi=True),
}
OPTIMIZERS: dict[str, type[Momentum | Adam | Yogi]] = {
    "momentum": Momentum,
    "adam": Adam,
    "yogi": Yogi,
}


class AggregationError(Exception):
    """The updates of a round amount to no usable generalist; the message is one line."""


@dataclass(frozen=True)
class Recipe:
    """How rounds are aggregated; `choose` makes one that is sound."""

    aggregation: str = "mean"
    """A key of MEANS or of AGAINST."""
    malicious: int = 1
    """For AGAINST: how many updates of a round may be arbitrary."""
    clip_norm: float | None = None
    optimizer: ServerOptimizer | None = None

    def strategy(self) -> Strategy:
        """A new one, for one round."""
        if self.aggregation in MEANS:
            strategy = MEANS[self.aggregation]()
        else:
            strategy = AGAINST[self.aggregation](self.malicious)
        return strategy if self.clip_norm is None else Clipped(strategy, self.clip_norm)

    def __str__(self) -> str:
        """For people: `krum against 1, clipped to 0.5, adam at 0.01`."""
        words = [self.aggregation]
        if self.aggregation in AGAINST:
            words[0] += f" against {self.malicious}"
        if self.clip_norm is not None:
            words.append(f"clipped to {self.clip_norm:g}")
        if self.optimizer is not None:
            words.append(f"{self.optimizer.name} at {self.optimizer.rate:g}")
        return ", ".join(words)


def choose(
    *,
    aggregation: str,
    min_devices: int,
    malicious: int | None = None,
    clip_norm: float | None = None,
    optimizer: str | None = None,
    constants: Mapping[str, float | None],
) -> Recipe:
    """A recipe out of options as the command line has them; None is one that was not given.

    Args:
        min_devices: fewest updates that a round will have.
        constants: of the server optimizer: rate, beta1, beta2, tau.

    Raises:
        ValueError: with one line that begins with the option at fault.
    """
    if aggregation not in {*MEANS, *AGAINST}:
        raise ValueError(
            f"--aggregation {aggregation} is not one of {', '.join([*MEANS, *AGAINST])}"
        )
    if malicious is not None and aggregation not in AGAINST:
        raise ValueError(
            f"--malicious means nothing to {aggregation}; leave it out, or choose --aggregation "
            f"{', '.join(AGAINST)}"
        )
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"--clip-norm {clip_norm:g} is not a number above 0")
    recipe = Recipe(
        aggregation=aggregation,
        malicious=1 if malicious is None else malicious,
        clip_norm=clip_norm,
        optimizer=_optimizer(optimizer, {k: v for k, v in constants.items() if v is not None}),
    )
    least = recipe.strategy().least_updates
    if min_devices < least:
        raise ValueError(
            f"--aggregation {aggregation} with --malicious {recipe.malicious} needs {least} "
            f"updates or more in every round; give --min-devices {least}, or fewer --malicious"
        )
    return recipe


def _optimizer(name: str | None, constants: Mapping[str, float]) -> ServerOptimizer | None:
    if name is None:
        for constant in constants:
            raise ValueError(
                f"--server-{constant} means nothing without --server-optimizer; leave it out, or "
                f"choose one of {', '.join(OPTIMIZERS)}"
            )
        return None
    if name not in OPTIMIZERS:
        raise ValueError(f"--server-optimizer {name} is not one of {', '.join(OPTIMIZERS)}")
    known = {field.name for field in fields(OPTIMIZERS[name])}
    for constant, value in constants.items():
        if constant not in known:
            raise ValueError(f"--server-{constant} means nothing to {name}; leave it out")
        decay = constant.startswith("beta")
        if not (0 <= value < 1 if decay else 0 < value < math.inf):
            wanted = "at least 0 and less than 1" if decay else "a number above 0"
            raise ValueError(f"--server-{constant} {value:g} is not {wanted}")
    return OPTIMIZERS[name](**constants)


@dataclass(frozen=True)
class Outcome:
    """What closing a round gives."""

    generalist: Vectors
    memory: bytes | None
    """Of the server optimizer, for the next round."""
    clipped: int
    """Updates that were longer than the recipe's norm."""


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
        incoming: shared role -> float32 vector that the devices started from.
        memory: what the previous round's outcome had; that of another optimizer is ignored.

    Raises:
        AdapterError: a file is missing or damaged.
        AggregationError: too few contributions, or numbers beyond float32.
    """
    strategy = recipe.strategy()
    ordered = sorted(contributions, key=lambda contribution: contribution.device)
    if len(ordered) < strategy.least_updates:
        raise AggregationError(
            f"{recipe} needs {strategy.least_updates} updates or more, and there are {len(ordered)}"
        )
    layout = Layout(manifest)
    start = layout.flatten(incoming)
    # One thread: how many there are would decide how sums are rounded.
    with threadpool_limits(1):
        strategy.configure_round(start)
        for contribution in ordered:
            strategy.accept(StoredUpdate(layout, contribution))
        flat = strategy.aggregate()
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
    clipped = strategy.clipped if isinstance(strategy, Clipped) else 0
    return Outcome(generalist=layout.split(result), memory=kept, clipped=clipped)


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
