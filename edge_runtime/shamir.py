"""Shamir's secret sharing (1979): `threshold` shares give the secret, fewer say nothing about it.

A secret of 32 bytes is the constant term of a random polynomial of degree threshold - 1 over the
integers modulo PRIME; a share is its value at a point from 1 on.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterable, Mapping

SECRET_BYTES = 32
# The smallest prime above 2^256, so that every secret is a residue.
PRIME = 2**256 + 297
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, points: Iterable[int]) -> dict[int, bytes]:
    """Point -> its share of `secret`, SHARE_BYTES long.

    Args:
        secret: SECRET_BYTES.
        threshold: shares that it takes to restore it, from 1.
        points: distinct, each from 1.
    """
    if len(secret) != SECRET_BYTES or threshold < 1:
        raise ValueError("a secret of 32 bytes and a threshold of 1 or more are needed")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    shares = {}
    for point in points:
        value = 0
        for coefficient in coefficients:  # Horner, from the highest degree
            value = (value * point + coefficient) % PRIME
        shares[point] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret that was split, out of exactly as many shares as it takes: point -> share.

    Raises:
        ValueError: no secret of 32 bytes has these shares.
    """
    return Polynomial(shares).secret()


class Polynomial:
    """Through some shares, in Newton's form."""

    def __init__(self, shares: Mapping[int, bytes]) -> None:
        """
        Args:
            shares: point -> its share.
        """
        self._points = points = list(shares)
        self._differences = known = [int.from_bytes(share, "big") for share in shares.values()]
        for order in range(1, len(points)):
            for i in range(len(points) - 1, order - 1, -1):
                inverse = _inverse(points[i] - points[i - order])
                known[i] = (known[i] - known[i - 1]) * inverse % PRIME

    def secret(self) -> bytes:
        """Raises as `combine`."""
        secret = self._value(0)
        if secret >> (8 * SECRET_BYTES):
            raise ValueError("these shares are of no secret of 32 bytes")
        return secret.to_bytes(SECRET_BYTES, "big")

    def share_at(self, point: int) -> bytes:
        return self._value(point).to_bytes(SHARE_BYTES, "big")

    def _value(self, at: int) -> int:
        value = 0
        for known, point in zip(reversed(self._differences), reversed(self._points), strict=True):
            value = (value * (at - point) + known) % PRIME
        return value


@functools.lru_cache(maxsize=4096)  # between numbers of a group
def _inverse(difference: int) -> int:
    return pow(difference, -1, PRIME)
