"""Who of a masking group shares secrets and masks with whom.

Small groups are complete. In a large one numbers lie on a circle, and a device is joined to as many
next ones on either side (SecAgg+, Bell et al. 2020, IACR ePrint 2020/704); so whoever knows
the size of the group and how many neighbours it has itself knows all of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A device keeps to these, too: who has fewer neighbours than they want refuses the group.
COLLUDING_SHARE = 0.2
SECRET_BITS = 40
# Below it, all-to-all costs little.
COMPLETE_UP_TO = 64


@dataclass(frozen=True)
class Graph:
    """On devices numbered from 1 to `devices`."""

    devices: int
    degree: int
    """Neighbours of each."""
    threshold: int
    """Shares that restore a secret. Its owner and the neighbours hold one each."""

    @property
    def is_complete(self) -> bool:
        return self.degree == self.devices - 1

    def hides(self, least: int) -> bool:
        """Whether it is complete; or large, and but for a probability of 2^-SECRET_BITS, if a
        COLLUDING_SHARE of all devices collude with the coordinator and numbers are dealt out at
        random, no threshold of them are neighbours of one device, and the others hang together.

        Args:
            least: devices that stay; the others drop out.
        """
        if self.is_complete:
            return True
        if self.devices <= COMPLETE_UP_TO:
            return False
        colluding = math.floor(COLLUDING_SHARE * self.devices)
        lost = min(1.0, (colluding + self.devices - least) / self.devices)
        apart = math.log2(self.devices) + self.degree / 2 * math.log2(lost)
        exposed = self.log_probability(colluding, range(self.threshold, self.degree + 1))
        return max(apart, exposed) <= -SECRET_BITS

    def log_probability(self, marked: int, hits: range) -> float:
        """log2 of (a bound of) the probability that of the neighbours of any device, drawn from the
        others, as many as in `hits` are `marked`: hypergeometric, times the devices."""
        others = self.devices - 1
        marked = min(marked, others)
        logs = [
            _log_choose(marked, hit)
            + _log_choose(others - marked, self.degree - hit)
            - _log_choose(others, self.degree)
            for hit in hits
            if max(0, self.degree - (others - marked)) <= hit <= min(marked, self.degree)
        ]
        if not logs:
            return -math.inf
        largest = max(logs)
        total = largest + math.log(sum(math.exp(log - largest) for log in logs))
        return (total + math.log(self.devices)) / math.log(2)

    def neighbours(self, number: int) -> list[int]:
        """Of device `number`, in order."""
        if self.is_complete:
            return [other for other in range(1, self.devices + 1) if other != number]
        reach = self.degree // 2
        around = [d for d in range(-reach, reach + 1) if d]
        return sorted((number - 1 + distance) % self.devices + 1 for distance in around)

    def covered(self, holders: Iterable[int]) -> set[int]:
        """The numbers of whose secrets a threshold of shares is with `holders`."""
        return _numbers(self.shares(holders) >= self.threshold)

    def shares(self, holders: Iterable[int]) -> NDArray[np.int64]:
        """(devices,), how many shares of each one's secrets are with `holders`."""
        there = self._marked(holders)
        if self.is_complete:
            return np.full(self.devices, there.sum())
        # Windows of `reach` on either side, around the circle.
        reach = self.degree // 2
        ahead = np.concatenate([[0], there[-reach:], there, there[:reach]]).cumsum()
        held: NDArray[np.int64] = ahead[2 * reach + 1 :] - ahead[: self.devices]
        return held

    def can_unmask(self, summed: set[int], dropped: set[int]) -> bool:
        """Whether the sum over `summed` can be unmasked and shows no sum over fewer.

        Args:
            dropped: the others that have pairwise masks with them.
        """
        return summed | dropped <= self.covered(summed) and self._is_one_part(summed)

    def binds(self, signers: Iterable[int]) -> bool:
        """Whether signatures of these leave nothing to be had with other signatures: everywhere
        they are more than half of those that hold shares of a device's secrets, and they hang
        together."""
        there = set(signers)
        return len(self.covered(there)) == self.devices and self._is_one_part(there)

    def _is_one_part(self, numbers: Iterable[int]) -> bool:
        """A part that is joined to no other by a mask would show its own sum."""
        # Nothing joins the ends of a gap that is wider than the reach, and one such gap leaves the
        # circle in one part.
        reach = self.devices if self.is_complete else self.degree // 2
        places = np.flatnonzero(self._marked(numbers))
        gaps = np.diff(places, append=places[:1] + self.devices)
        return int((gaps > reach).sum()) <= 1

    def _marked(self, numbers: Iterable[int]) -> NDArray[np.int64]:
        """(devices,), 1 for those in `numbers`."""
        marks = np.zeros(self.devices, np.int64)
        marks[np.array(list(numbers), np.int64) - 1] = 1
        return marks


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _numbers(marks: NDArray[np.bool_]) -> set[int]:
    return set((np.flatnonzero(marks) + 1).tolist())
