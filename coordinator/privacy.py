"""Secure aggregation and differential privacy, out of options as the command line has them."""

from __future__ import annotations

import math
from dataclasses import replace

from coordinator.accounting import Privacy, epsilon
from coordinator.aggregation import Noise, Recipe
from coordinator.secure_aggregation import STAGE_SECONDS, STAYING, Masking
from coordinator.selection import Selection
from edge_runtime.secure_aggregation import LEAST_DEVICES

DELTA = 1e-5
# With so much, rounds cost nothing; its square must fit a float.
MOST_NOISE = 1e6


def mask(
    wanted: bool,
    *,
    staying: float | None,
    stage_seconds: float | None,
    recipe: Recipe,
    selection: Selection | None,
    min_devices: int,
    insecure: bool,
) -> Masking | None:
    """How rounds are masked, if they are; None is an option that was not given.

    Raises:
        ValueError: it cannot be done with the other options; one line says why.
    """
    if not wanted:
        for option, value in (("threshold", staying), ("stage", stage_seconds)):
            if value is not None:
                name = "--secure-threshold" if option == "threshold" else "--stage-seconds"
                raise ValueError(f"{name} means nothing without --secure-aggregation")
        return None
    if insecure:
        raise ValueError(
            "--secure-aggregation needs devices that prove who they are, or one party could be all "
            "of them; leave out --insecure"
        )
    if recipe.aggregation != "mean":
        raise ValueError(
            f"--secure-aggregation shows nobody a single update, and --aggregation "
            f"{recipe.aggregation} {_needs(recipe.aggregation)}; choose mean, or do without one"
        )
    if recipe.ranks is not None:
        raise ValueError(
            "--secure-aggregation is for updates of one shape, which all masks have; leave out "
            f"--mixed-ranks {recipe.ranks}"
        )
    if min_devices < LEAST_DEVICES:
        raise ValueError(
            f"--secure-aggregation sums up {LEAST_DEVICES} devices or more, since of two each "
            f"would learn the other's update; give --min-devices {LEAST_DEVICES}"
        )
    staying = STAYING if staying is None else staying
    if not 0.5 < staying <= 1:
        raise ValueError(
            f"--secure-threshold {staying:g} is not above 0.5 and at most 1: with half of the "
            "shares or fewer, both secrets of a device could be restored"
        )
    masking = Masking(
        staying=staying,
        stage_seconds=STAGE_SECONDS if stage_seconds is None else stage_seconds,
        min_devices=min_devices,
        clip_norm=recipe.clip_norm,
        noise_multiplier=0.0 if recipe.noise is None else recipe.noise.multiplier,
        divisor=None if recipe.noise is None else recipe.noise.devices,
    )
    if selection is not None:
        masking.terms(selection.wanted)  # so large a group must be possible
    return masking


def noise(
    multiplier: float | None,
    *,
    delta: float | None,
    budget: float | None,
    recipe: Recipe,
    selection: Selection | None,
) -> tuple[Recipe, Privacy | None]:
    """The recipe with the noise that was asked for, and what is accounted for.

    Raises:
        ValueError: it would promise nothing with the other options; one line says why.
    """
    if multiplier is None:
        for option, value in (("--dp-delta", delta), ("--dp-budget", budget)):
            if value is not None:
                raise ValueError(f"{option} means nothing without --dp-noise")
        return recipe, None
    delta = DELTA if delta is None else delta
    if not 0 < multiplier <= MOST_NOISE:
        raise ValueError(f"--dp-noise {multiplier:g} is not a number above 0, up to {MOST_NOISE:g}")
    if not 0 < delta < 1:
        raise ValueError(f"--dp-delta {delta:g} is not between 0 and 1")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"--dp-budget {budget:g} is not a number above 0")
    if recipe.clip_norm is None:
        raise ValueError(
            "--dp-noise hides steps up to a length; give it with --clip-norm, and start with a "
            "norm that clips about half of them"
        )
    if recipe.aggregation != "mean":
        raise ValueError(
            f"--dp-noise is for a sum that each device changes by at most --clip-norm, and "
            f"--aggregation {recipe.aggregation} {_unbounded(recipe.aggregation)}; choose mean"
        )
    if recipe.ranks is not None:
        raise ValueError(
            f"--dp-noise is for updates of one shape, and with --mixed-ranks {recipe.ranks} how "
            "much a device can change depends on the others; leave one out"
        )
    if selection is None:
        raise ValueError(
            "--dp-noise needs --devices-per-round: the sum is divided by a fixed number, so that "
            "nothing depends on how many devices reported"
        )
    privacy = Privacy(multiplier, delta, budget)
    first = epsilon({multiplier: 1}, delta)
    if budget is not None and first > budget:
        raise ValueError(
            f"--dp-budget {budget:g} is less than what one round costs, {first:.3g}; raise it, or "
            "--dp-noise"
        )
    return replace(recipe, noise=Noise(multiplier, selection.wanted)), privacy


def _unbounded(aggregation: str) -> str:
    if aggregation == "token-mean":
        return "lets it choose its weight"
    return "has no such bound"


def _needs(aggregation: str) -> str:
    if aggregation == "token-mean":
        return "would let a device choose its weight unseen"
    return "has to compare them"
