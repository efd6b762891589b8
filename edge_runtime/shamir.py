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
    secret = 0
    for point, weight in _weights(tuple(shares)).items():
        secret += weight * int.from_bytes(shares[point], "big")
    secret %= PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("these shares are of no secret of 32 bytes")
    return secret.to_bytes(SECRET_BYTES, "big")


@functools.lru_cache(
    maxsize=16
)  # in a complete graph all secrets are restored from the same points
def _weights(points: tuple[int, ...]) -> dict[int, int]:
    """Point i -> product over the others j of j / (j - i): Lagrange's interpolation at 0."""
    weights = {}
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        weights[point] = above * pow(below, -1, PRIME) % PRIME
    return weights
