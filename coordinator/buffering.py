"""Asynchronous rounds, as of FedBuff (Nguyen et al. 2022): a generalist for every K updates.

A device trains on what it downloaded while newer generalists are made. A round is then the buffer
between two of them, and an update counts in the first one with room, which may be later than the
one that its device started from (see aggregation/staleness.py for what it adds there).
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.aggregation import Recipe
from coordinator.selection import Selection

MAX_STALENESS = 10


@dataclass(frozen=True)
class Buffering:
    """How updates are gathered without rounds that wait for each other."""

    size: int
    """K: updates that make a generalist."""
    max_staleness: int
    """Updates that started from an earlier generalist than so many before are refused."""

    def __str__(self) -> str:
        return f"asynchronous by {self.size}, up to {self.max_staleness} behind"


def buffer(
    size: int | None,
    *,
    max_staleness: int | None,
    min_devices: int | None,
    deadline: float | None,
    recipe: Recipe,
    selection: Selection | None,
    masked: bool,
) -> Buffering | None:
    """Asynchronous rounds out of options as the command line has them; None is one not given.

    Raises:
        ValueError: with one line that says what does not go together, and why.
    """
    if size is None:
        if max_staleness is not None:
            raise ValueError("--max-staleness means nothing without --asynchronous")
        return None
    if min_devices is not None or deadline is not None:
        option = "--deadline" if min_devices is None else "--min-devices"
        raise ValueError(
            f"{option} means nothing with --asynchronous: a generalist is made when there are so "
            "many updates, whenever that is; leave it out"
        )
    if recipe.noise is not None:
        raise ValueError(
            "--dp-noise is accounted for with updates of equal weight, and with --asynchronous one "
            "among staler ones weighs more; leave one of them out"
        )
    if selection is not None:
        raise ValueError(
            "--devices-per-round selects who begins together, and with --asynchronous nobody "
            "waits for others to begin; leave one of them out"
        )
    if recipe.aggregation not in ("mean", "token-mean"):
        raise ValueError(
            f"--aggregation {recipe.aggregation} tells honest updates from others by how alike "
            "they are, and with --asynchronous honest ones differ by what they started from; "
            "choose mean or token-mean, with --clip-norm against malicious devices"
        )
    if recipe.ranks is not None:
        raise ValueError(
            f"--mixed-ranks {recipe.ranks} puts whole experts together, and --asynchronous only "
            "their differences from several generalists; leave one of them out"
        )
    if masked:
        raise ValueError(
            "--secure-aggregation needs devices that are there together, to share their secrets, "
            "and with --asynchronous each comes when it likes; leave one of them out"
        )
    staleness = MAX_STALENESS if max_staleness is None else max_staleness
    return Buffering(size=size, max_staleness=staleness)
