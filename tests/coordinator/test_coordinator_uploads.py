"""What a hostile or broken device sends is refused with a reason, and stops nobody else."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from coordinator_help import (
    PATIENCE,
    Fleet,
    check_in_until,
    header,
    join_round,
    mean_of,
    train,
)
from safetensors.numpy import load, save

from edge_runtime import wire
from edge_runtime.client import Client
from edge_runtime.connection import connect
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

A = "generalist/h.0.mlp.c_fc.lora_A.weight"


def announce(payload: bytes, **fields: object) -> pb.UploadPart:
    full = header(1)
    full.total_bytes = len(payload)
    full.sha256 = hashlib.sha256(payload).digest()
    for name, value in fields.items():
        setattr(full, name, value)
    return pb.UploadPart(header=full)


def parts(payload: bytes, **fields: object) -> list[pb.UploadPart]:
    data = [pb.UploadPart(data=piece) for piece in wire.chunks(payload)]
    return [announce(payload, **fields), *data]


def altered(payload: bytes, **tensors: np.ndarray) -> bytes:
    """`payload` with lora_A replaced (`a`) or with further tensors."""
    named = load(payload)
    if "a" in tensors:
        named[A] = tensors.pop("a")
    return save(named | {name.replace("__", "/"): value for name, value in tensors.items()})


def headed(tensor: dict[str, object]) -> bytes:
    """A safetensors file without data, whose header says that of each tensor."""
    header = json.dumps({A: tensor, A.replace("lora_A", "lora_B"): tensor}).encode()
    return len(header).to_bytes(8, "little") + header


def hostile(good: bytes) -> dict[str, tuple[list[pb.UploadPart], str]]:
    """What is sent, and what the refusal must say."""
    a = load(good)[A]
    bad = a.copy()
    bad[0, 0] = np.nan
    infinite = a.copy()
    infinite[1, 1] = -np.inf
    specialist = altered(good, specialist__x=a[:1, :1])
    renamed = {name.replace("generalist", "specialist.1"): v for name, v in load(good).items()}
    missing = {name: value for name, value in load(good).items() if name != A}
    data = pb.UploadPart(data=b"x")
    long = "x" * 200_000
    typed = headed({"dtype": long, "shape": [0], "data_offsets": [0, 0]})
    shaped = headed({"dtype": "F32", "shape": [0] * 25_000, "data_offsets": [0, 0]})
    return {
        "nan": (parts(altered(good, a=bad)), "NaN or an infinity"),
        "infinity": (parts(altered(good, a=infinite)), "NaN or an infinity"),
        "shape": (parts(altered(good, a=a.T.copy())), "instead of F32[2, 60000]"),
        "dtype": (parts(altered(good, a=a.astype(np.float16))), "is F16"),
        "specialist": (parts(save(renamed)), "specialist.1/"),
        "extra": (parts(specialist), "specialist/x is not a shared tensor"),
        "missing": (parts(save(missing)), f"{A} is missing"),
        "a name of two lines": (parts(save({"\n\0\x1b[2J": a[:1]})), "[2J is not a shared"),
        "a name without end": (parts(save({long: a[:1, :1]})), "xxx is not a shared tensor"),
        "a type without end": (parts(typed), "not a safetensors payload"),
        "a shape without end": (parts(shaped), "instead of F32[2, 60000]"),
        "empty": ([announce(b"")], "0 bytes were announced"),
        "no header": ([data], "does not start with a header"),
        "two headers": ([announce(good), announce(good)], "other than data"),
        "too big": ([announce(good, total_bytes=2**40), data], "at most"),
        "more than announced": ([*parts(good), data], "more data came"),
        "checksum": (parts(good, sha256=bytes(32)), "does not match"),
        "no checksum": (parts(good, sha256=b""), "no SHA-256"),
        "garbage": (parts(np.random.default_rng(0).bytes(5000)), "not a safetensors payload"),
        "no tokens": (parts(good, tokens=0), "0 tokens"),
        "too many tokens": (parts(good, tokens=2**64 - 1), "tokens"),
    }


class Raw:
    """Sends what no `Client` would."""

    def __init__(self, client: Client):
        self.channel = connect(client.who, PATIENCE).channel

    def upload(self, sent: Iterator[pb.UploadPart]) -> pb.UploadReply:
        stub = coordinator_pb2_grpc.CoordinatorStub(self.channel)
        return stub.Upload(sent, timeout=30)

    def check_in(self, wait_seconds: float) -> pb.CheckInReply:
        stub = coordinator_pb2_grpc.CoordinatorStub(self.channel)
        request = pb.CheckInRequest(wait_seconds=wait_seconds)
        return stub.CheckIn(request, timeout=10)

    def upload_bytes(self, sent: Iterator[bytes]) -> bytes:
        call = self.channel.stream_unary("/comigs.v1.Coordinator/Upload")
        return call(sent, timeout=30)


def peak_memory(pid: int) -> int:
    """Largest resident set of a process so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_hostile_uploads_are_refused_and_the_round_goes_on(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=60_000)
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "2")
    ada, ben, eve = fleet.enrolled(served, bundle, "ada", "ben", "eve")
    join_round(ada, ben, eve)
    raw = Raw(eve)
    start = ada.download(1)
    attacks = hostile(train(bundle, start, 2, 1))
    for name, (sent, reason) in attacks.items():
        reply = raw.upload(iter(sent))
        assert not reply.accepted, name
        assert reason in reply.reason, (name, reply.reason)
        assert reply.reason.isprintable(), name
        assert len(reply.reason) <= 300, name
        refused = served.wait_for("update_refused")
        assert refused["device"] == "eve"
        assert refused["reason"] == reply.reason
    good = parts(train(bundle, start, 2, 1))
    for sent, reason in ((good[:0], "before it began"), (good[:-1], "truncated")):
        with pytest.raises(grpc.RpcError) as broken:
            raw.upload(iter(sent))
        assert broken.value.code() == grpc.StatusCode.ABORTED
        assert reason in served.wait_for("upload_broken", device="eve")["reason"]
    with pytest.raises(grpc.RpcError):
        raw.upload_bytes(iter([b"\xff\xff\xff not a message"]))
    assert raw.check_in(float("nan")).action == pb.CheckInReply.WAIT
    raw.channel.close()

    assert eve.check_in(0).action == pb.CheckInReply.WAIT
    updates = [train(bundle, start, seed, 1) for seed in range(2)]
    assert ada.upload(header(1), updates[0]).accepted
    assert ben.upload(header(1), updates[1]).accepted
    assert served.wait_for("round_closed")["updates"] == 2
    final = check_in_until(eve, pb.CheckInReply.FINISH)
    got = wire.decode(bundle.manifest, eve.download(final.round))["generalist"]
    assert got.tobytes() == mean_of(bundle, updates).tobytes()
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        count = connection.execute("select count(*) from refusals").fetchone()
    assert count == (len(attacks),)


def test_an_endless_upload_is_cut_off_without_being_buffered(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    raw = Raw(ada)
    before = peak_memory(served.process.pid)
    sent = 0

    def endless() -> Iterator[pb.UploadPart]:
        nonlocal sent
        yield announce(b"x" * 1000)
        while sent < 2**30:
            sent += 200_000
            yield pb.UploadPart(data=bytes(200_000))

    reply = raw.upload(endless())
    raw.channel.close()
    assert "more data came" in reply.reason
    assert sent < 2**27
    assert peak_memory(served.process.pid) - before < 32 * 2**20


def test_an_upload_has_no_room_for_anything_but_the_generalist() -> None:
    """A new field here is a decision about what leaves a device."""
    fields = {field.name for field in pb.UploadHeader.DESCRIPTOR.fields}
    assert fields == {
        *("round", "total_bytes", "sha256", "tokens", "offset", "compression", "history")
    }
    assert {field.name for field in pb.UploadPart.DESCRIPTOR.fields} == {"header", "data"}
