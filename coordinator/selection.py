"""Which of the devices that are present take part in a round."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

OVER_SELECTION = 1.3


@dataclass(frozen=True)
class Selection:
    """Some devices per round, chosen by a seed.

    More are selected than are wanted, since some drop out; the round is over when the wanted number
    has reported (Bonawitz et al. 2019, arXiv 1902.01046, who select 130 %).
    """

    wanted: int
    """Updates after which a round closes."""
    over_selection: float
    """Devices to select for each wanted one, at least 1."""
    seed: int
    is_drawn: bool = False
    """Whether the seed is of this start only."""

    def choose(self, number: int, candidates: Iterable[str]) -> list[str]:
        """Those who take part in round `number`: the names that come first by a seeded hash.

        Every subset of a size is equally likely, and the choice depends on nothing but the seed,
        the round and the names. All candidates, if they are fewer than are to be selected.
        """
        ranked = sorted(candidates, key=lambda name: self._rank(number, name))
        return ranked[: self.selected]

    @property
    def selected(self) -> int:
        """Devices in a round, if enough are there."""
        # Rounded first: 1.1 * 10 is a little more than 11.
        return math.ceil(round(self.wanted * self.over_selection, 6))

    def _rank(self, number: int, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed} {number} {name}".encode()).digest()

    def __str__(self) -> str:
        seed = "drawn" if self.is_drawn else self.seed
        return f"{self.selected} selected for {self.wanted}, seed {seed}"


def select(
    wanted: int | None, over_selection: float | None, seed: int | None, *, min_devices: int
) -> Selection | None:
    """A selection out of options as the command line has them; None is one that was not given.

    Without a seed one is drawn: nobody can foresee whom it chooses.

    Raises:
        ValueError: with one line that begins with the option at fault.
    """
    if wanted is None:
        for option, value in (("--over-selection", over_selection), ("--seed", seed)):
            if value is not None:
                raise ValueError(f"{option} means nothing without --devices-per-round")
        return None
    if wanted < min_devices:
        raise ValueError(
            f"--devices-per-round {wanted} is less than the {min_devices} updates that a round "
            "needs; raise it, or lower --min-devices"
        )
    over_selection = OVER_SELECTION if over_selection is None else over_selection
    if not 1 <= over_selection < math.inf:
        raise ValueError(f"--over-selection {over_selection:g} is not a number of at least 1")
    if seed is None:
        return Selection(wanted, over_selection, secrets.randbits(64), is_drawn=True)
    return Selection(wanted, over_selection, seed)
