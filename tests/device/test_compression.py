"""Compressed updates: what is left out comes later, and nothing but a compressed step is taken."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load, save

from edge_runtime.compression import BLOCK, NAMES, TOP_SHARE, compress, decompress
from edge_runtime.errors import AdapterError
from protos import coordinator_pb2 as pb

KINDS = list(NAMES.values())
SIZES = st.integers(1, 3 * BLOCK)
STEPS = SIZES.flatmap(
    lambda size: arrays(
        np.float32, size, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@given(STEPS, st.sampled_from(KINDS))
@example(np.array([np.finfo(np.float32).max], np.float32), pb.COMPRESSION_INT8)
def test_what_is_sent_arrives_and_is_never_larger_than_the_step(
    step: np.ndarray, kind: int
) -> None:
    payload = compress(kind, step)
    assert compress(kind, step.copy()) == payload
    got = decompress(kind, payload, step.size)
    assert got.dtype == np.float32
    assert got.shape == step.shape
    largest = float(np.abs(step).max())
    # Half a unit in the last place, of the smallest numbers in float16 too.
    assert np.abs(got).max() <= largest * (1 + 2**-10) + 2**-25


def test_precision_and_size() -> None:
    """Half a unit in the last place, half a level of a block, and all but the largest left out."""
    step = normal(10_000)
    sizes = {name: len(compress(kind, step)) / step.size for name, kind in NAMES.items()}
    assert sizes["float16"] == pytest.approx(2, abs=0.02)
    assert sizes["int8"] == pytest.approx(1 + 4 / BLOCK, abs=0.02)
    assert sizes["top-k"] == pytest.approx(6 * TOP_SHARE, abs=0.02)

    half = decompress(NAMES["float16"], compress(NAMES["float16"], step), step.size)
    assert (np.abs(half - step) <= np.abs(step) * 2**-11 + 2**-25).all()
    small = decompress(NAMES["int8"], compress(NAMES["int8"], step), step.size)
    for start in range(0, step.size, BLOCK):
        part = slice(start, start + BLOCK)
        level = np.abs(step[part]).max() / 127
        assert np.abs(small[part] - step[part]).max() <= level * 0.501
    top = decompress(NAMES["top-k"], compress(NAMES["top-k"], step), step.size)
    count = round(step.size * TOP_SHARE)
    assert set(np.flatnonzero(top)) == set(np.argsort(-np.abs(step))[:count])


@pytest.mark.parametrize("name", NAMES)
def test_error_feedback_sends_everything_in_the_end(name: str) -> None:
    """After n rounds of a constant step s the sum of what was sent is n s less the residual, and
    the residual stays bounded, so their mean tends to s."""
    step = normal(4096)
    residual, total = np.zeros_like(step), np.zeros(step.size)
    rounds = 400
    for _ in range(rounds):
        due = step + residual
        sent = decompress(NAMES[name], compress(NAMES[name], due), step.size)
        residual = due - sent
        total += sent
    np.testing.assert_allclose(
        total + residual, rounds * step.astype(np.float64), rtol=1e-3, atol=1e-2
    )
    error = np.linalg.norm(total / rounds - step) / np.linalg.norm(step)
    assert error < {"float16": 1e-6, "int8": 1e-4, "top-k": 0.1}[name]
    lost = decompress(NAMES[name], compress(NAMES[name], step), step.size)
    assert error < 0.2 * np.linalg.norm(lost - step) / np.linalg.norm(step)


def altered(kind: int, **tensors: np.ndarray | None) -> bytes:
    named = load(compress(kind, normal(1000))) | tensors
    return save({name: value for name, value in named.items() if value is not None})


HALF, INT8, TOP_K = KINDS
SENT = len(load(compress(TOP_K, normal(1000)))["index"])
COUNTING = np.arange(SENT, dtype=np.uint32)
HOSTILE = {
    "an index out of range": (TOP_K, altered(TOP_K, index=COUNTING + np.uint32(1000 - SENT + 1))),
    "a huge index": (TOP_K, altered(TOP_K, index=np.full(SENT, 2**32 - 1, np.uint32))),
    "an index twice": (TOP_K, altered(TOP_K, index=np.zeros(SENT, np.uint32))),
    "falling indices": (TOP_K, altered(TOP_K, index=COUNTING[::-1].copy())),
    "signed indices": (TOP_K, altered(TOP_K, index=COUNTING.astype(np.int32))),
    "fewer values": (TOP_K, altered(TOP_K, step=np.zeros(SENT - 1, np.float16))),
    "no index": (TOP_K, altered(TOP_K, index=np.zeros(0, np.uint32), step=np.zeros(0, np.float16))),
    "too many": (
        TOP_K,
        altered(TOP_K, index=np.arange(1001, dtype=np.uint32), step=np.zeros(1001, np.float16)),
    ),
    "a NaN": (HALF, altered(HALF, step=np.full(1000, np.nan, np.float16))),
    "an infinity": (TOP_K, altered(TOP_K, step=np.full(SENT, -np.inf, np.float16))),
    "an infinite scale": (INT8, altered(INT8, scale=np.full(4, np.inf, np.float32))),
    "a NaN scale": (INT8, altered(INT8, scale=np.full(4, np.nan, np.float32))),
    "a scale beyond float32": (
        INT8,
        altered(INT8, scale=np.full(4, 3e38, np.float32), step=np.full(1000, 127, np.int8)),
    ),
    "no scale": (INT8, altered(INT8, scale=None)),
    "too few scales": (INT8, altered(INT8, scale=np.ones(3, np.float32))),
    "something else": (HALF, altered(HALF, router=np.zeros(4, np.float32))),
    "another type": (HALF, altered(HALF, step=np.zeros(1000, np.float32))),
    "another shape": (HALF, altered(HALF, step=np.zeros((10, 100), np.float16))),
    "another length": (HALF, altered(HALF, step=np.zeros(10**6, np.float16))),
    "another kind": (INT8, compress(HALF, normal(1000))),
    "nothing": (HALF, b""),
    # A header that claims a tensor far larger than the payload.
    "a bomb": (
        HALF,
        (n := b'{"step":{"dtype":"F16","shape":[1000000000000],"data_offsets":[0,2000000000000]}}')
        and len(n).to_bytes(8, "little") + n,
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_anything_else_is_refused(attack: str) -> None:
    kind, payload = HOSTILE[attack]
    with pytest.raises(AdapterError) as refused:
        decompress(kind, payload, 1000)
    assert "\n" not in str(refused.value)


@settings(max_examples=300)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), min_size=1, max_size=4),
)
def test_mutated_payloads_are_refused_or_mean_a_step(
    kind: int, changes: list[tuple[int, bytes]]
) -> None:
    payload = bytearray(compress(kind, normal(100)))
    for start, content in changes:
        payload[start : start + len(content)] = content
    with contextlib.suppress(AdapterError):
        step = decompress(kind, bytes(payload), 100)
        assert step.shape == (100,)
        assert np.isfinite(step).all()


def test_every_compression_of_the_contract_has_a_name() -> None:
    assert set(NAMES.values()) == set(pb.Compression.values()) - {pb.COMPRESSION_NONE}
