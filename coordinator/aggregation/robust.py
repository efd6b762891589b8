"""Strategies that bear some malicious updates. They need all updates at once, so they read them
again in blocks of coordinates; a block of all updates has at most BLOCK_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.means import Mean
from coordinator.aggregation.updates import Flat, Update, blocks

BLOCK_BYTES = 32 * 2**20


class _Robust:
    """Keeps the updates, not their numbers, until the round is aggregated."""

    def configure_round(self, incoming: Flat) -> None:
        self._incoming = incoming
        self._updates: list[Update] = []

    def accept(self, update: Update) -> None:
        self._updates.append(update)

    def _blocks(self) -> Iterator[tuple[slice, Flat]]:
        """Coordinates, and what the n updates say there, (n, width); the array is used again."""
        count = len(self._updates)
        pieces = list(blocks(self._incoming.size, count, BLOCK_BYTES))
        block = np.empty((count, max(stop - start for start, stop in pieces)))
        for start, stop in pieces:
            for row, update in zip(block, self._updates, strict=True):
                update.read(start, stop, row[: stop - start])
            yield slice(start, stop), block[:, : stop - start]


class Median(_Robust):
    """Coordinate-wise median (Yin et al. 2018, option I). Bears fewer than half of the updates."""

    least_updates = 1

    def aggregate(self) -> Flat:
        result = np.empty_like(self._incoming)
        for part, block in self._blocks():
            result[part] = np.median(block, axis=0, overwrite_input=True)
        return result


class TrimmedMean(_Robust):
    """Coordinate-wise mean without the f largest and the f smallest values (Yin et al. 2018,
    option II, with beta = f / n)."""

    def __init__(self, malicious: int) -> None:
        """`malicious` is f."""
        self._malicious = malicious
        self.least_updates = 2 * malicious + 1

    def aggregate(self) -> Flat:
        result = np.empty_like(self._incoming)
        for part, block in self._blocks():
            block.sort(axis=0)
            kept = block[self._malicious : len(block) - self._malicious]
            result[part] = kept.sum(axis=0) / len(kept)
        return result


class Krum(_Robust):
    """The update whose n - f - 2 closest others are the closest (Blanchard et al. 2017, section 4).

    Multi-Krum is the mean of the m best such, here with m = n - f - 2. Of equal scores the first
    accepted is the better. Memory also grows by some n x n distances of 8 bytes.
    """

    def __init__(self, malicious: int, *, multi: bool = False) -> None:
        """`malicious` is f."""
        self._malicious = malicious
        self._multi = multi
        self.least_updates = 2 * malicious + 3

    def aggregate(self) -> Flat:
        neighbours = len(self._updates) - self._malicious - 2
        closest = np.sort(self._squared_distances(), axis=1)[:, :neighbours]
        best = np.argsort(closest.sum(axis=1), kind="stable")
        chosen = best[: neighbours if self._multi else 1]
        mean = Mean()
        mean.configure_round(self._incoming)
        for index in sorted(chosen.tolist()):
            mean.accept(self._updates[index])
        return mean.aggregate()

    def _squared_distances(self) -> NDArray[np.float64]:
        """|a|^2 + |b|^2 - 2 <a, b> for each two updates' steps a, b; (n, n), infinite to itself."""
        count = len(self._updates)
        products = np.zeros((count, count))
        for part, block in self._blocks():
            steps = np.subtract(block, self._incoming[part], out=block)
            products += steps @ steps.T
        squares = np.diag(products)
        distances = np.maximum(squares[:, None] + squares - 2 * products, 0)
        np.fill_diagonal(distances, np.inf)
        return distances
