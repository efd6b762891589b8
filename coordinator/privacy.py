"""Secure aggregation, out of options as the command line has them."""

from __future__ import annotations

from coordinator.aggregation import Recipe
from coordinator.neighbours import graph_for
from coordinator.secure_aggregation import STAGE_SECONDS, STAYING, Masking
from coordinator.selection import Selection
from edge_runtime.secure_aggregation import LEAST_DEVICES


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
    if selection is not None:
        graph_for(selection.wanted, staying)  # so many neighbours must be possible
    return Masking(
        staying=staying,
        stage_seconds=STAGE_SECONDS if stage_seconds is None else stage_seconds,
        min_devices=min_devices,
        clip_norm=recipe.clip_norm,
        noise_multiplier=0.0,
    )


def _needs(aggregation: str) -> str:
    if aggregation == "token-mean":
        return "would let a device choose its weight unseen"
    return "has to compare them"
