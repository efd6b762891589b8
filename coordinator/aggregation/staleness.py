"""Updates that started from an earlier generalist, as in asynchronous rounds: FedBuff (Nguyen et
al. 2022, arXiv 2106.06639).

What a device adds is its step d = y - x_b from the generalist x_b that it started from, weighted by
s(t) = 1 / sqrt(1 + t), where t is how many generalists came since. The next generalist is x plus
the weighted mean of the steps, sum_i s_i d_i / sum_i s_i; the paper's algorithm 1 divides by the
number of updates, which also makes the whole step shorter the staler they are.
"""

from __future__ import annotations

import math
from pathlib import Path

from coordinator.aggregation.updates import Contribution, Flat, Layout, Update, trouble
from edge_runtime import wire
from edge_runtime.errors import AdapterError
from protos import manifest_pb2 as pb


def decay(staleness: int) -> float:
    """s(t)."""
    return 1 / math.sqrt(1 + staleness)


class Rebased:
    """An update as if its device had started from the round's generalist x: x + (y - x_b)."""

    def __init__(self, update: Update, *, began: Flat, incoming: Flat, staleness: int) -> None:
        self._update, self._began, self._incoming = update, began, incoming
        self.tokens = update.tokens
        self.decay = decay(staleness)

    def began(self, incoming: Flat, start: int, stop: int) -> Flat:
        return incoming[start:stop]

    def read(self, start: int, stop: int, out: Flat | None = None) -> Flat:
        step = self._update.read(start, stop, out)
        step -= self._began[start:stop]
        step += self._incoming[start:stop]
        return step


class Beginnings:
    """What updates started from; one vector is in memory at a time."""

    def __init__(self, manifest: pb.Manifest, layout: Layout, incoming: Flat) -> None:
        self._manifest, self._layout, self._incoming = manifest, layout, incoming
        self._path: Path | None = None
        self._began = incoming

    def rebase(self, update: Update, contribution: Contribution) -> Update:
        """`update`, which is that of `contribution`, in a round that starts from elsewhere.

        Raises:
            DamagedUpdateError: the generalist that it started from is missing or damaged.
            StorageError: it cannot be read now.
        """
        if contribution.began is None:
            return update
        if contribution.began != self._path:
            self._began = self._read(contribution)
            self._path = contribution.began
        return Rebased(
            update,
            began=self._began,
            incoming=self._incoming,
            staleness=contribution.staleness,
        )

    def _read(self, contribution: Contribution) -> Flat:
        assert contribution.began is not None
        try:
            payload = contribution.began.read_bytes()
            return self._layout.flatten(wire.decode(self._manifest, payload))
        except (OSError, AdapterError) as error:
            raise trouble(contribution, error, contribution.began) from error
