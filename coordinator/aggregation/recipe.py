"""A choice of strategy, clipping and server optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from coordinator.aggregation.clipping import Clipped
from coordinator.aggregation.means import Mean
from coordinator.aggregation.optimizers import Adam, Momentum, ServerOptimizer, Yogi
from coordinator.aggregation.private import PrivateMean
from coordinator.aggregation.ranks import FlexLoRA, HetLoRA
from coordinator.aggregation.robust import Krum, Median, TrimmedMean
from coordinator.aggregation.updates import Layout, Strategy

PLAIN: dict[str, Callable[[], Strategy]] = {
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
# How updates of different LoRA ranks become one.
RANKS = ("zero-pad", "hetlora", "flexlora")
OPTIMIZERS: dict[str, type[Momentum | Adam | Yogi]] = {
    "momentum": Momentum,
    "adam": Adam,
    "yogi": Yogi,
}


@dataclass(frozen=True)
class Noise:
    """Of differential privacy; see `PrivateMean`."""

    multiplier: float
    devices: int


@dataclass(frozen=True)
class Recipe:
    """How rounds are aggregated; `choose` makes one that is sound."""

    aggregation: str = "mean"
    """A key of PLAIN or of AGAINST."""
    malicious: int = 1
    """For AGAINST: how many updates of a round may be arbitrary."""
    clip_norm: float | None = None
    optimizer: ServerOptimizer | None = None
    ranks: str | None = None
    """One of RANKS; None: all updates have the generalist's rank."""
    noise: Noise | None = None
    """Of differential privacy; None: there is none."""

    @property
    def least_updates(self) -> int:
        """Fewest updates for which it is defined."""
        if self.aggregation in AGAINST:
            return AGAINST[self.aggregation](self.malicious).least_updates
        return 1

    def strategy(self, layout: Layout) -> Strategy:
        """A new one, for one round of generalists of that layout."""
        strategy: Strategy
        if self.noise is not None and self.clip_norm is not None:
            return PrivateMean(
                norm=self.clip_norm,
                noise_multiplier=self.noise.multiplier,
                devices=self.noise.devices,
            )
        if self.ranks == "hetlora":
            strategy = HetLoRA(layout)
        elif self.ranks == "flexlora":
            strategy = FlexLoRA(layout, by_tokens=self.aggregation == "token-mean")
        elif self.aggregation in PLAIN:
            strategy = PLAIN[self.aggregation]()
        else:
            strategy = AGAINST[self.aggregation](self.malicious)
        return strategy if self.clip_norm is None else Clipped(strategy, self.clip_norm)

    def __str__(self) -> str:
        """For people: `krum against 1, clipped to 0.5, adam at 0.01`."""
        words = [self.aggregation]
        if self.aggregation in AGAINST:
            words[0] += f" against {self.malicious}"
        if self.ranks is not None:
            words.append(self.ranks)
        if self.clip_norm is not None:
            words.append(f"clipped to {self.clip_norm:g}")
        if self.noise is not None:
            words.append(f"noise {self.noise.multiplier:g} over {self.noise.devices}")
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
    ranks: str | None = None,
    constants: Mapping[str, float | None],
) -> Recipe:
    """A recipe out of options as the command line has them; None is one that was not given.

    Args:
        min_devices: fewest updates that a round will have.
        constants: of the server optimizer: rate, beta1, beta2, tau.

    Raises:
        ValueError: with one line that begins with the option at fault.
    """
    if aggregation not in {*PLAIN, *AGAINST}:
        raise ValueError(
            f"--aggregation {aggregation} is not one of {', '.join([*PLAIN, *AGAINST])}"
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
        ranks=ranks,
    )
    _check_ranks(recipe)
    least = recipe.least_updates
    if min_devices < least:
        raise ValueError(
            f"--aggregation {aggregation} with --malicious {recipe.malicious} needs {least} "
            f"updates or more in every round; give --min-devices {least}, or fewer --malicious"
        )
    return recipe


def _check_ranks(recipe: Recipe) -> None:
    """Refuses what is not sound for updates of different ranks."""
    ranks, aggregation = recipe.ranks, recipe.aggregation
    if ranks is None:
        return
    if ranks not in RANKS:
        raise ValueError(f"--mixed-ranks {ranks} is not one of {', '.join(RANKS)}")
    if aggregation not in ("mean", "token-mean"):
        raise ValueError(
            f"--aggregation {aggregation} compares updates coordinate by coordinate, and with "
            "--mixed-ranks the zeros that a smaller device never sent would count as its word; "
            "choose --aggregation mean or token-mean"
        )
    if ranks == "hetlora" and aggregation != "mean":
        raise ValueError(
            "--mixed-ranks hetlora weighs devices by what they learnt, so not by their tokens; "
            "choose --aggregation mean, or --mixed-ranks zero-pad or flexlora"
        )
    if ranks == "flexlora" and recipe.optimizer is not None:
        raise ValueError(
            "--mixed-ranks flexlora gives the generalist new factors in every round, so the "
            f"moments of --server-optimizer {recipe.optimizer.name} would be of others; leave it "
            "out, or choose --mixed-ranks zero-pad or hetlora"
        )


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
