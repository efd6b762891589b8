"""Shamir's secret sharing (1979): `threshold` shares give the secret, fewer say nothing about it.

A secret of 32 bytes is the constant term of a random polynomial of degree threshold - 1 over the
integers modulo PRIME; a share is its value at a point from 1 on.
"""

from __future__ import annotations

import functools
import itertools
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


_Coefficients = list[int]
"""Of a polynomial, the constant first, the last one not 0."""


class Polynomial:
    """Modulo PRIME."""

    def __init__(self, coefficients: _Coefficients) -> None:
        self._coefficients = coefficients

    def secret(self) -> bytes:
        """What was split into the shares on it.

        Raises:
            ValueError: no secret of 32 bytes has them.
        """
        secret = self._value(0)
        if secret >> (8 * SECRET_BYTES):
            raise ValueError("these shares are of no secret of 32 bytes")
        return secret.to_bytes(SECRET_BYTES, "big")

    def has(self, point: int, share: bytes) -> bool:
        """Whether that is its share at `point`."""
        return (self._value(point) - int.from_bytes(share, "big")) % PRIME == 0

    def _value(self, at: int) -> int:
        value = 0
        for coefficient in reversed(self._coefficients):
            value = (value * at + coefficient) % PRIME
        return value


def through(shares: Mapping[int, bytes]) -> Polynomial:
    """The polynomial of the least degree on which all these shares are: point -> share."""
    return Polynomial(_interpolated(shares))


def near(shares: Mapping[int, bytes], threshold: int) -> Polynomial | None:
    """The one polynomial of degree threshold - 1 on which at least (m + threshold) / 2 of m shares
    are; None if there is none. Decodes a Reed-Solomon code as Gao 2003 does ("A new algorithm for
    decoding Reed-Solomon codes", algorithm 1)."""
    there: _Coefficients = [1]
    for point in shares:
        there = _sum([0, *there], [-point * each for each in there])
    # The extended Euclidean algorithm, up to half of its way.
    rest, follows = there, _interpolated(shares)
    before: _Coefficients = []
    factor = [1]
    while 2 * (len(follows) - 1) >= len(shares) + threshold:
        quotient, remainder = _divided(rest, follows)
        rest, follows = follows, remainder
        before, factor = factor, _sum(before, [-each for each in _product(quotient, factor)])
    found, remainder = _divided(follows, factor)
    polynomial = Polynomial(found)
    on = sum(polynomial.has(point, share) for point, share in shares.items())
    if remainder or len(found) > threshold or 2 * on < len(shares) + threshold:
        return None
    return polynomial


def _interpolated(shares: Mapping[int, bytes]) -> _Coefficients:
    points, known = list(shares), [int.from_bytes(share, "big") for share in shares.values()]
    for order in range(1, len(points)):  # Newton's divided differences
        for i in range(len(points) - 1, order - 1, -1):
            inverse = _inverse(points[i] - points[i - order])
            known[i] = (known[i] - known[i - 1]) * inverse % PRIME
    coefficients: _Coefficients = []
    for point, difference in zip(reversed(points), reversed(known), strict=True):
        coefficients = [difference, *coefficients]
        for i in range(len(coefficients) - 1):  # times (x - point), plus the difference
            coefficients[i] = (coefficients[i] - point * coefficients[i + 1]) % PRIME
    return _trimmed(coefficients)


def _sum(a: _Coefficients, b: _Coefficients) -> _Coefficients:
    return _trimmed([(x + y) % PRIME for x, y in itertools.zip_longest(a, b, fillvalue=0)])


def _product(a: _Coefficients, b: _Coefficients) -> _Coefficients:
    result = [0] * (len(a) + len(b))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] += x * y
    return _trimmed([each % PRIME for each in result])


def _divided(a: _Coefficients, b: _Coefficients) -> tuple[_Coefficients, _Coefficients]:
    """Quotient and remainder."""
    rest, inverse = list(a), pow(b[-1], -1, PRIME)
    quotient = [0] * max(0, len(a) - len(b) + 1)
    for i in range(len(quotient) - 1, -1, -1):
        quotient[i] = factor = rest[i + len(b) - 1] * inverse % PRIME
        for j, each in enumerate(b):
            rest[i + j] = (rest[i + j] - factor * each) % PRIME
    return _trimmed(quotient), _trimmed(rest)


def _trimmed(coefficients: _Coefficients) -> _Coefficients:
    while coefficients and not coefficients[-1]:
        coefficients.pop()
    return coefficients


@functools.lru_cache(maxsize=4096)  # between numbers of a group
def _inverse(difference: int) -> int:
    return pow(difference, -1, PRIME)
