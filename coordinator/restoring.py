"""Secrets out of shares of which some may be false.

A member of a masking group can deal out shares that fit no secret, and can reveal others than it
was dealt. What a secret is can be checked, so false shares keep none back as long as enough are
true. Of m shares, t of which restore a secret, (m - t) / 2 may be false for it to be clear which
are; then who is to blame can be told, too.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from edge_runtime import shamir

# Sets of shares that are tried where more may be false than that: all, in a small group.
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
    secrets: dict[int, bytes] = {}
    for owner, each in shared.items():
        chosen = dict(sorted(each.shares.items())[:threshold])
        secret = _secret(shamir.through(chosen), each) if len(chosen) == threshold else None
        if secret is not None:
            secrets[owner] = secret
    if len(secrets) == len(shared):
        return Restored(secrets, set(), set(), set())
    witness = _Witness()
    for owner, each in shared.items():
        near = shamir.near(each.shares, threshold)
        secret = None if near is None else _secret(near, each)
        witness.look(each, near if secret is not None else None)
        if owner not in secrets and (secret := secret or _tried(each, threshold)) is not None:
            secrets[owner] = secret
    lost = shared.keys() - secrets.keys()
    honest = witness.honest()
    return Restored(
        secrets=secrets,
        lost=lost,
        # With no more than the threshold, one of these could have kept back what others deal.
        dealers={owner for owner in lost if len(shared[owner].asked & honest) > threshold},
        liars=witness.liars(),
    )


class _Witness:
    """What secrets say about the holders of their shares."""

    def __init__(self) -> None:
        self._told: Counter[int] = Counter()
        self._false: Counter[int] = Counter()
        self._true: Counter[int] = Counter()

    def look(self, shared: Shared, polynomial: shamir.Polynomial | None) -> None:
        """Compares all shares with the polynomial of the secret, if that is known."""
        self._told.update(shared.shares.keys())
        if polynomial is not None:
            true = {h for h, share in shared.shares.items() if polynomial.has(h, share)}
            self._true.update(true)
            self._false.update(shared.shares.keys() - true)

    def liars(self) -> set[int]:
        """Of all whose shares most are false: a few may be so by those who dealt them."""
        return {h for h, count in self._false.items() if count > max(1, self._told[h] / 2)}

    def honest(self) -> set[int]:
        return self._true.keys() - self.liars()


def _secret(polynomial: shamir.Polynomial, shared: Shared) -> bytes | None:
    """What a polynomial gives, if it is the secret."""
    try:
        secret = polynomial.secret()
    except ValueError:
        return None
    return secret if shared.is_right(secret) else None


def _tried(shared: Shared, threshold: int) -> bytes | None:
    """The secret, if some set of shares gives it and there are not too many to try."""
    if math.comb(len(shared.shares), threshold) <= TRIES:
        for chosen in itertools.combinations(shared.shares.items(), threshold):
            if (secret := _secret(shamir.through(dict(chosen)), shared)) is not None:
                return secret
    return None
