"""Weighted means: FedAvg (McMahan et al. 2017, algorithm 1), x = sum_i w_i x_i / sum_i w_i."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from coordinator.aggregation.updates import Flat, Update, blocks

THREADS = 2
# Of the sum, that is added to at once; it stays in a core's cache.
BLOCK_BYTES = 2**20


class Mean:
    """The mean of the updates as a stream: one of them is in memory at a time.

    Sums are float64, in the order in which updates are accepted. Threads share the coordinates, so
    how many there are does not matter to the result.
    """

    least_updates = 1

    def __init__(self, *, by_tokens: bool = False) -> None:
        """Weights are 1 or, `by_tokens`, the tokens that a device trained on; times the update's
        decay."""
        self._by_tokens = by_tokens

    def configure_round(self, incoming: Flat) -> None:
        self._sum = np.zeros_like(incoming)
        self._total = 0.0
        self._parts = list(blocks(incoming.size, 1, BLOCK_BYTES))
        # Used again, since memory that is new costs more than what is done with it.
        width = max((stop - start for start, stop in self._parts), default=0)
        self._pieces = np.empty((THREADS, width))
        self._threads = ThreadPoolExecutor(THREADS, "mean")

    def accept(self, update: Update) -> None:
        weight = update.decay * (update.tokens if self._by_tokens else 1)

        def add(thread: int) -> None:
            for start, stop in self._parts[thread::THREADS]:
                piece = self._pieces[thread, : stop - start]
                vector = update.read(start, stop, piece)
                if weight != 1:
                    vector *= weight
                self._sum[start:stop] += vector

        for _ in self._threads.map(add, range(THREADS)):
            pass  # raises what `add` raised
        self._total += weight

    def aggregate(self) -> Flat:
        self._threads.shutdown()
        self._sum /= self._total
        return self._sum
