"""The arithmetic of secure aggregation: shares, masks, integers and noise."""

from __future__ import annotations

import math
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_runtime import masking, shamir
from edge_runtime.noise import discrete_gaussian
from edge_runtime.quantization import (
    Grid,
    grid_for,
    quantize,
    quantize_clipped,
    residues,
    signed,
    squared_norm,
)

SECRETS = st.binary(min_size=32, max_size=32)


@given(SECRETS, st.integers(1, 9), st.data())
def test_any_threshold_shares_give_the_secret(
    secret: bytes, threshold: int, data: st.DataObject
) -> None:
    points = data.draw(
        st.lists(st.integers(1, 10**6), min_size=threshold, max_size=12, unique=True)
    )
    shares = shamir.split(secret, threshold, points)
    chosen = data.draw(st.permutations(points))[:threshold]
    assert shamir.through({point: shares[point] for point in chosen}).secret() == secret
    assert {len(share) for share in shares.values()} == {shamir.SHARE_BYTES}


@settings(deadline=None)
@given(SECRETS, st.integers(1, 6), st.integers(0, 8), st.randoms(use_true_random=False))
def test_half_of_the_shares_beyond_the_threshold_may_be_false(
    secret: bytes, threshold: int, beyond: int, draw: random.Random
) -> None:
    points = draw.sample(range(1, 100), threshold + beyond)
    shares = shamir.split(secret, threshold, points)
    made_up = {point: draw.randbytes(shamir.SHARE_BYTES) for point in points[: beyond // 2]}
    found = shamir.near(shares | made_up, threshold)
    assert found is not None
    assert found.secret() == secret
    assert all(found.has(point, share) for point, share in shares.items())
    nothing = {point: os.urandom(shamir.SHARE_BYTES) for point in points}
    if beyond > 1:
        assert shamir.near(nothing, threshold) is None


def test_shares_are_those_of_the_textbook() -> None:
    """By rationals: the polynomial through t shares and through the secret at 0 is one."""
    secret = bytes(range(32))
    shares = {i: int.from_bytes(s, "big") for i, s in shamir.split(secret, 3, range(1, 6)).items()}
    third_differences = [
        shares[i + 3] - 3 * shares[i + 2] + 3 * shares[i + 1] - shares[i] for i in (1, 2)
    ]
    assert [d % shamir.PRIME for d in third_differences] == [0, 0], "a degree above threshold - 1"
    at_0 = 3 * shares[1] - 3 * shares[2] + shares[3]
    assert at_0 % shamir.PRIME == int.from_bytes(secret, "big")


@given(SECRETS, SECRETS, st.integers(2, 6))
def test_fewer_shares_fit_every_secret(secret: bytes, other: bytes, threshold: int) -> None:
    """threshold - 1 shares and any secret at all lie on a polynomial: they say nothing."""
    shares = shamir.split(secret, threshold, range(1, threshold + 1))
    held = {point: shares[point] for point in range(1, threshold)}
    missing = [
        candidate
        for candidate in (_share_for(held, secret, threshold), _share_for(held, other, threshold))
    ]
    assert shamir.through({**held, threshold: missing[0]}).secret() == secret
    assert shamir.through({**held, threshold: missing[1]}).secret() == other


def _share_for(held: dict[int, bytes], secret: bytes, point: int) -> bytes:
    """The share at `point` that makes `held` the shares of `secret`."""
    points = {0: int.from_bytes(secret, "big")}
    points |= {at: int.from_bytes(share, "big") for at, share in held.items()}
    value = 0
    for i, y in points.items():
        term = y
        for j in points:
            if i != j:
                term = term * (point - j) * pow(i - j, -1, shamir.PRIME) % shamir.PRIME
        value += term
    return (value % shamir.PRIME).to_bytes(shamir.SHARE_BYTES, "big")


def test_shares_of_no_secret_are_refused() -> None:
    shares = {1: (2**256).to_bytes(shamir.SHARE_BYTES, "big")}
    with pytest.raises(ValueError, match="no secret"):
        shamir.through(shares).secret()


def test_the_mask_is_aes_in_counter_mode() -> None:
    """NIST SP 800-38A has no counter from 0; this is AES-256 of the counter, block by block."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    seed = bytes(range(32))
    block = Cipher(AES(seed), ECB()).encryptor()
    stream = b"".join(block.update(counter.to_bytes(16, "big")) for counter in range(3))
    np.testing.assert_array_equal(masking.expand(seed, 10), np.frombuffer(stream, "<u4")[:10])


def test_both_ends_of_a_pair_agree_and_nobody_else() -> None:
    """Keys and shared secret of RFC 7748, section 6.1."""
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f92ebc0992ac177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert masking.public_key(bob).hex().startswith("de9edb7d7b7dc1b4d35b61c2ece43537")
    one = masking.agree(alice, masking.public_key(bob), b"3")
    assert one == masking.agree(bob, masking.public_key(alice), b"3")
    assert one != masking.agree(alice, masking.public_key(bob), b"4"), "not for this"
    with pytest.raises(ValueError, match="key"):  # of low order
        masking.agree(alice, bytes(32), b"3")


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 7), st.data())
def test_masks_vanish_from_the_sum_of_those_who_stay(count: int, data: st.DataObject) -> None:
    """Equation by equation: whoever drops out, what is known of them mends the sum."""
    size = 5
    vectors = data.draw(arrays(np.int64, (count, size), elements=st.integers(-(2**28), 2**28)))
    keys = [bytes([index + 1]) * 32 for index in range(count)]
    own = [bytes([index + 101]) * 32 for index in range(count)]

    def seeds(u: int, others: list[int]) -> dict[int, bytes]:
        public = {v: masking.public_key(keys[v]) for v in others if v != u}
        return {v: masking.agree(keys[u], public[v], b"") for v in public}

    everyone = list(range(count))
    sent = []
    for u in everyone:
        masked = residues(vectors[u])
        masking.add_masks(masked, own=[own[u]], pairwise=seeds(u, everyone), index=u)
        sent.append(masked)
    stay = sorted(data.draw(st.sets(st.sampled_from(everyone), min_size=1)))
    total = np.zeros(size, np.uint32)
    for u in stay:
        total += sent[u]
        total -= masking.expand(own[u], size)
    for u in set(everyone) - set(stay):
        # What the stayers added for u, u would have taken away.
        masking.add_masks(total, pairwise=seeds(u, stay), index=u)
    np.testing.assert_array_equal(signed(total), vectors[stay].sum(axis=0))


def test_what_was_sealed_opens_for_its_receiver_only() -> None:
    sealed = masking.seal(b"k" * 32, b"shares", b"from 1 to 2")
    assert masking.unseal(b"k" * 32, sealed, b"from 1 to 2") == b"shares"
    for key, message, context in (
        (b"x" * 32, sealed, b"from 1 to 2"),
        (b"k" * 32, sealed, b"from 2 to 1"),
        (b"k" * 32, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"from 1 to 2"),
        (b"k" * 32, b"", b"from 1 to 2"),
    ):
        with pytest.raises(ValueError, match="sealed"):
            masking.unseal(key, message, context)


NUMBERS = st.floats(-4, 4, width=32)


@given(arrays(np.float32, 9, elements=NUMBERS), st.integers(1, 10**5))
def test_integers_are_the_numbers_rounded(step: np.ndarray, devices: int) -> None:
    grid = grid_for(1.0, devices)
    integers, beyond = quantize(step, grid)
    inside = np.clip(step.astype(np.float64), -1, 1)
    assert np.abs(integers * grid.unit - inside).max() <= grid.unit * 0.5000001
    assert beyond == sum(abs(x) > 1 for x in step.tolist())


@given(st.integers(1, 10**6), st.floats(0, 1000))
def test_no_sum_wraps(devices: int, noise: float) -> None:
    """The largest sum, all devices at the bound and the noise at its tail, is the sum."""
    grid = grid_for(0.5, devices, noise)
    most = grid.levels * devices + math.floor(12 * noise * grid.levels)
    for sum_ in (most, -most):
        assert signed(residues(np.array([sum_]))).tolist() == [sum_]
    assert grid.levels + 1 > (2**31 - 1) / (devices + 12 * noise), "a finer one would do"


@given(arrays(np.float32, 50, elements=st.floats(-1e3, 1e3, width=32)), st.integers(1, 1000))
def test_clipped_integers_are_within_the_norm(step: np.ndarray, devices: int) -> None:
    grid = grid_for(0.25, devices)
    integers, clipped = quantize_clipped(step, grid)
    assert squared_norm(integers) == sum(x * x for x in integers.tolist()) <= grid.levels**2
    norm = np.linalg.norm(step.astype(np.float64))
    assert clipped == (norm > 0.25)
    expected = step.astype(np.float64) * min(1, 0.25 / norm if norm else 1)
    assert np.abs(integers * grid.unit - expected).max() <= (math.sqrt(50) / 2 + 1) * grid.unit


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    for quantized in (quantize, quantize_clipped):
        with pytest.raises(ValueError, match="NaN"):
            quantized(np.array([0.1, bad], np.float32), Grid(1.0, 1000))


def test_a_grid_too_coarse_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        quantize_clipped(np.zeros(10_000, np.float32), Grid(1.0, 50))


@pytest.mark.parametrize("sigma", [0.7, 3.0, 1e5])
def test_noise_is_the_discrete_gaussian(sigma: float) -> None:
    """By the Kolmogorov distance to the sum of exp(-y^2 / 2 sigma^2); fails once in 10^9 runs."""
    count = 200_000
    samples = discrete_gaussian(sigma, count)
    reach = math.ceil(8 * sigma)
    values = np.arange(-reach, reach + 1)
    weights = np.exp(-(values**2) / (2 * sigma**2))
    expected = np.cumsum(weights) / weights.sum()
    seen = np.searchsorted(np.sort(samples), values, side="right") / count
    assert np.abs(seen - expected).max() < 3.3 / math.sqrt(count)
    assert not np.array_equal(samples, discrete_gaussian(sigma, count))


def test_no_two_orders_of_a_pair_give_the_same_mask_sign() -> None:
    seed = b"s" * 32
    one, other = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    masking.add_masks(one, pairwise={2: seed}, index=1)
    masking.add_masks(other, pairwise={1: seed}, index=2)
    assert one.any()
    np.testing.assert_array_equal(one + other, np.zeros(4))
