"""Properties of what crosses the wire and of the average, on arbitrary inputs."""

import contextlib
import itertools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coordinator_help import make_manifest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coordinator.aggregation import Contribution, Recipe, aggregate
from coordinator.uploads import read_part
from edge_runtime import wire
from edge_runtime.errors import AdapterError
from protos import coordinator_pb2 as pb

MANIFEST = make_manifest(width=3)
SIZE = next(role.size for role in MANIFEST.roles if role.name == "generalist")
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = arrays(np.float32, SIZE, elements=FINITE)
PAYLOAD = wire.encode(MANIFEST, {"generalist": np.arange(SIZE, dtype=np.float32)})


def averaged(vectors: list[np.ndarray], weights: list[int], order: list[int]) -> np.ndarray:
    """The mean over files on disk, listed in `order`."""
    with tempfile.TemporaryDirectory() as folder:
        contributions = []
        for index, (vector, weight) in enumerate(zip(vectors, weights, strict=True)):
            path = Path(folder, str(index))
            path.write_bytes(wire.encode(MANIFEST, {"generalist": vector}))
            contributions.append(Contribution(f"{index:03}", path, weight))
        outcome = aggregate(
            MANIFEST,
            Recipe("token-mean"),
            incoming={"generalist": np.zeros(SIZE, np.float32)},
            contributions=[contributions[index] for index in order],
        )
        return outcome.generalist["generalist"]


@given(VECTORS)
def test_wire_round_trip(vector: np.ndarray) -> None:
    payload = wire.encode(MANIFEST, {"generalist": vector, "router": np.zeros(6, np.float32)})
    assert len(payload) <= wire.max_bytes(MANIFEST)
    assert b"".join(wire.chunks(payload)) == payload
    decoded = wire.decode(MANIFEST, payload)
    assert list(decoded) == ["generalist"]
    assert decoded["generalist"].tobytes() == vector.tobytes()


@given(st.binary(max_size=2000))
def test_decode_of_arbitrary_bytes(payload: bytes) -> None:
    with contextlib.suppress(AdapterError):
        wire.decode(MANIFEST, payload)
        raise AssertionError("arbitrary bytes were accepted")


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good payload with bytes replaced, removed and inserted, mostly in its header."""
    payload = bytearray(PAYLOAD)
    for _ in range(draw(st.integers(1, 4))):
        near = st.integers(0, min(len(payload), 400) - 1)
        start = draw(st.one_of(near, st.integers(0, len(payload) - 1)))
        end = start + draw(st.integers(0, 8))
        words = st.sampled_from([b"BF16", b"F64", b"I8", b"BOOL", b"F8_E4M3", b"-1", b"1e9", b"{"])
        payload[start:end] = draw(st.one_of(st.binary(max_size=8), words))
        if not payload:
            return b""
    return bytes(payload)


@settings(max_examples=600)
@given(mutated())
def test_decode_of_mutated_payloads(payload: bytes) -> None:
    """Refused as an AdapterError, or, where only numbers changed, exactly what they say."""
    with contextlib.suppress(AdapterError):
        vectors = wire.decode(MANIFEST, payload)
        assert [vector.shape for vector in vectors.values()] == [(SIZE,)]
        assert np.isfinite(vectors["generalist"]).all()


def complaint(look: Callable[..., None], *given: object) -> str | None:
    try:
        look(*given)
    except AdapterError as error:
        return str(error)
    return None


@given(st.lists(mutated() | st.just(PAYLOAD), max_size=4), st.integers(1, 100))
def test_a_payload_is_checked_piece_by_piece_as_it_is_at_once(
    payloads: list[bytes], piece: int
) -> None:
    checker = wire.Checker(MANIFEST)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "payload")
        for payload in (PAYLOAD, *payloads):
            path.write_bytes(payload)
            content = wire.Incoming()
            for start in range(0, len(payload), piece):
                content.add(memoryview(payload)[start : start + piece])
            wanted = complaint(wire.check, MANIFEST, path)
            assert complaint(checker.end, content, path) == wanted


@given(st.sampled_from([b"F64", b"F16", b"BF16", b"I32", b"U8", b"BOOL", b"F8_E4M3", b"F8_E5M2"]))
def test_decode_of_other_dtypes(dtype: bytes) -> None:
    """The header may name any type of the format; none but F32 passes, and none crashes."""
    changed = PAYLOAD.replace(b'"F32"', b'"' + dtype + b'"')
    size = int.from_bytes(changed[:8], "little") + (len(changed) - len(PAYLOAD))
    with pytest.raises(AdapterError) as refused:
        wire.decode(MANIFEST, size.to_bytes(8, "little") + changed[8:])
    assert "\n" not in str(refused.value)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(VECTORS, st.integers(1, 2**53)), min_size=1, max_size=6), st.randoms())
def test_mean_is_the_float64_reference_in_any_order(
    updates: list[tuple[np.ndarray, int]], shuffle: random.Random
) -> None:
    vectors, weights = [vector for vector, _ in updates], [weight for _, weight in updates]
    order = list(range(len(updates)))
    expected = averaged(vectors, weights, order)
    shuffle.shuffle(order)
    assert averaged(vectors, weights, order).tobytes() == expected.tobytes()
    stacked = np.stack(vectors).astype(np.longdouble)
    shares = np.array(weights, np.longdouble)[:, None]
    reference = (stacked * shares).sum(axis=0) / shares.sum()
    scale = np.abs(stacked).max(axis=0)
    assert (np.abs(expected - reference) <= scale * 2.0**-23 + 1e-44).all()


def test_mean_adds_in_the_order_of_device_ids() -> None:
    """(1e30 + 1) - 1e30 is 0 in float64, (1e30 - 1e30) + 1 is 1: only one order may be taken."""
    vectors = [np.full(SIZE, value, np.float32) for value in (1e30, 1.0, -1e30)]
    for order in itertools.permutations(range(3)):
        np.testing.assert_array_equal(averaged(vectors, [1] * 3, list(order)), np.zeros(SIZE))


@given(VECTORS, st.lists(st.integers(1, 2**53), min_size=1, max_size=6))
def test_mean_of_equal_updates_is_the_update(vector: np.ndarray, weights: list[int]) -> None:
    got = averaged([vector] * len(weights), weights, list(range(len(weights))))
    np.testing.assert_array_equal(got, vector)


DATA = st.binary(max_size=300).map(lambda data: pb.UploadPart(data=data).SerializeToString())
TAGGED = st.binary(max_size=20).map(lambda rest: b"\x12" + rest)


@given(content=st.one_of(DATA, TAGGED, st.binary(max_size=20)))
def test_a_part_of_an_upload_is_read_as_protobuf_reads_it(content: bytes) -> None:
    try:
        known = pb.UploadPart.FromString(content)
    except DecodeError:
        with pytest.raises(DecodeError):
            read_part(content)
        return
    got = read_part(content)
    if isinstance(got, memoryview):
        got = pb.UploadPart(data=bytes(got))
    assert (got.WhichOneof("part"), got.data) == (known.WhichOneof("part"), known.data)
