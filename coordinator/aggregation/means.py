"""Weighted means: FedAvg (McMahan et al. 2017, algorithm 1), x = sum_i w_i x_i / sum_i w_i."""

from __future__ import annotations

import numpy as np

from coordinator.aggregation.updates import Flat, Update


class Mean:
    """The mean of the updates as a stream: one of them is in memory at a time.

    Sums are float64, in the order in which updates are accepted.
    """

    least_updates = 1

    def __init__(self, *, by_tokens: bool = False) -> None:
        """Weights are 1 or, `by_tokens`, the tokens that a device trained on; times the update's
        decay."""
        self._by_tokens = by_tokens

    def configure_round(self, incoming: Flat) -> None:
        self._sum = np.zeros_like(incoming)
        self._total = 0.0

    def accept(self, update: Update) -> None:
        weight = update.decay * (update.tokens if self._by_tokens else 1)
        vector = update.read(0, self._sum.size)
        if weight != 1:
            vector *= weight
        self._sum += vector
        self._total += weight

    def aggregate(self) -> Flat:
        return self._sum / self._total
