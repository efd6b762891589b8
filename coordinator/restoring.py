"""Secrets out of shares of which some may be false.

A member of a masking group can deal out shares that fit no secret, and can reveal others than it
was dealt. What a secret is can be checked, so false shares keep none back as long as enough are
true. Who is to blame can be told if the polynomial of a secret is beyond doubt: if of m shares, t
of which restore it, (m + t) / 2 are on it. On one that (m - t) / 2 liars make up there are fewer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass

from edge_runtime import shamir

# Sets of shares that are tried for one secret. With a few liars among many holders, one of so many
# sets is true; and where there are few holders, there are no more sets.
TRIES = 256


@dataclass(frozen=True)
class Shared:
    """A secret of one member, as others have revealed it."""

    shares: Mapping[int, bytes]
    """Holder -> its share."""
    asked: Set[int]
    """Who has revealed something, and should have revealed a share of this one."""
    is_right: Callable[[bytes], bool]
    """Whether this is the secret."""


@dataclass(frozen=True)
class Restored:
    secrets: dict[int, bytes]
    """Owner -> its secret."""
    lost: set[int]
    """Owners whose secrets are not to be had from what was revealed."""
    dealers: set[int]
    """Those of them that have dealt out false shares; of the others it cannot be told."""
    liars: set[int]
    """Holders that have revealed false shares, as far as can be told."""


def restore(shared: Mapping[int, Shared], threshold: int) -> Restored:
    """The secrets of all owners in `shared`.

    Args:
        threshold: shares that it takes.
    """
    witness = _Witness(threshold)
    found = {owner: _find(each, threshold, witness, 1) for owner, each in shared.items()}
    failed = [owner for owner, each in found.items() if each is None]
    if failed:
        for owner in found.keys() - set(failed):
            witness.look(shared[owner], found[owner])
        for owner in failed:
            found[owner] = _find(shared[owner], threshold, witness, TRIES)
            witness.look(shared[owner], found[owner])
    lost = {owner for owner, each in found.items() if each is None}
    return Restored(
        secrets={owner: each[0] for owner, each in found.items() if each is not None},
        lost=lost,
        dealers={o for o in lost if len(shared[o].asked & witness.honest()) >= threshold},
        liars=witness.liars(),
    )


Found = tuple[bytes, shamir.Polynomial] | None
"""A secret, and a polynomial that it is on."""


class _Witness:
    """What shares that are beyond doubt say about their holders."""

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._told: Counter[int] = Counter()
        self.false: Counter[int] = Counter()
        """Holder -> shares of it that are not what they should be."""

    def look(self, shared: Shared, found: Found) -> None:
        """Compares the shares of a secret with a polynomial that gives it, if that is its own."""
        if found is None:
            return
        if (wrong := self.beside(shared, found[1])) is not None:
            self._told.update(shared.shares.keys())
            self.false.update(wrong)

    def beside(self, shared: Shared, polynomial: shamir.Polynomial) -> set[int] | None:
        """Whose shares are not on a polynomial; None if it is not beyond doubt."""
        wrong = {h for h, share in shared.shares.items() if polynomial.share_at(h) != share}
        right = len(shared.shares) - len(wrong)
        return wrong if 2 * right >= len(shared.shares) + self._threshold else None

    def liars(self) -> set[int]:
        """Of whose shares most are false: a few may be so by those who dealt them."""
        return {h for h, count in self.false.items() if count > max(1, self._told[h] / 2)}

    def honest(self) -> set[int]:
        return self._told.keys() - self.liars()


def _find(shared: Shared, threshold: int, witness: _Witness, tries: int) -> Found:
    """With a polynomial that is beyond doubt, if one of so many sets of shares gives it: those are
    tried first that are most credible. None: none of them gives the secret."""
    holders = sorted(shared.shares, key=lambda holder: (witness.false[holder], holder))
    found: Found = None
    for chosen in itertools.islice(_choices(holders, threshold), tries):
        polynomial = shamir.Polynomial({holder: shared.shares[holder] for holder in chosen})
        try:
            secret = polynomial.secret()
        except ValueError:
            continue
        if shared.is_right(secret):
            found = found or (secret, polynomial)
            if tries == 1 or witness.beside(shared, polynomial) is not None:
                return secret, polynomial
    return found


def _choices(holders: list[int], count: int) -> Iterator[tuple[int, ...]]:
    """Sets of `count` of them, the first ones first."""
    if math.comb(len(holders), count) <= TRIES:
        yield from itertools.combinations(holders, count)
        return
    yield tuple(holders[:count])
    draw = random.Random(0)  # noqa: S311 - nothing is secret about it
    while True:
        yield tuple(draw.sample(holders, count))
