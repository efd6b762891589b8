"""A bound on how far one device can move the generalist, whatever the strategy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coordinator.aggregation.updates import Flat, Strategy, Update


class Clipped:
    """Another strategy, on updates whose steps have an L2 norm of at most S.

    The step d = x_i - x of a device from the incoming generalist x becomes d min(1, S / |d|): flat
    clipping of McMahan et al. 2018 (arXiv 1710.06963). For a device of a smaller rank, x is what it
    got of the generalist.
    """

    def __init__(self, strategy: Strategy, norm: float) -> None:
        """`norm` is S, more than 0."""
        self._strategy = strategy
        self._norm = norm
        self.least_updates = strategy.least_updates

    def configure_round(self, incoming: Flat) -> None:
        self.clipped = 0
        """How many of the accepted updates were longer."""
        self._incoming = incoming
        self._strategy.configure_round(incoming)

    def accept(self, update: Update) -> None:
        step = update.read(0, self._incoming.size)
        step -= update.began(self._incoming, 0, self._incoming.size)
        norm = float(np.linalg.norm(step))
        if norm > self._norm:
            self.clipped += 1
            update = _Shortened(update, self._incoming, self._norm / norm)
        self._strategy.accept(update)

    def aggregate(self) -> Flat:
        return self._strategy.aggregate()


@dataclass(frozen=True)
class _Shortened:
    update: Update
    incoming: Flat
    factor: float

    @property
    def tokens(self) -> int:
        return self.update.tokens

    @property
    def decay(self) -> float:
        return self.update.decay

    def read(self, start: int, stop: int, out: Flat | None = None) -> Flat:
        vector = self.update.read(start, stop, out)
        began = self.began(self.incoming, start, stop)
        vector -= began
        vector *= self.factor
        vector += began
        return vector

    def began(self, incoming: Flat, start: int, stop: int) -> Flat:
        return self.update.began(incoming, start, stop)
