"""Transfers that break go on at the byte where they stopped, and still arrive whole."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import grpc
import numpy as np
import pytest
from coordinator_help import (
    PATIENCE,
    TIMEOUT,
    Fleet,
    check_in_until,
    files_of,
    free_port,
    header,
    ids,
    join_round,
    mean_of,
    train,
    until,
)

from edge_runtime import wire
from edge_runtime.client import Client
from edge_runtime.compression import compress
from edge_runtime.connection import Patience, connect
from edge_runtime.errors import UnreachableError
from edge_runtime.identity import Identity
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

WIDTH = 300_000  # 2.4 MB
HANDSHAKE = 100_000  # more than TLS, HTTP/2 and the small calls of a few connections take


class Proxy:
    """Passes TCP on to `target`, and cuts one connection after another when so many bytes have
    gone through it in one direction; later connections are left alone.

    Before a cut it waits until `arrived` says that as many bytes in all as sent, but for what gRPC
    holds back until a message is whole, are where they are kept: else how many are depends on
    whether the receiver was quick.
    """

    def __init__(
        self,
        target: str,
        arrived: Callable[[], int],
        *,
        up: list[int] | None = None,
        down: list[int] | None = None,
    ):
        self._arrived = arrived
        host, port = target.split(":")
        self._target = (host, int(port))
        self._limits = {"up": list(up or ()), "down": list(down or ())}
        self.passed = {"up": 0, "down": 0}
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:{1}".format(*self._listener.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with contextlib.suppress(OSError):
                    server = socket.create_connection(self._target)
                    for way, (source, sink) in {
                        "up": (client, server),
                        "down": (server, client),
                    }.items():
                        limit = self._limits[way].pop(0) if self._limits[way] else None
                        threading.Thread(
                            target=self._pass, args=(way, source, sink, limit), daemon=True
                        ).start()

    def _pass(
        self, way: str, source: socket.socket, sink: socket.socket, limit: int | None
    ) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while limit is None or passed < limit:
                data = source.recv(16_384)
                if not data:
                    break
                sink.sendall(data)
                passed += len(data)
                self.passed[way] += len(data)
            else:
                self.cuts += 1
                wanted = self.passed[way] - self.cuts * 2 * wire.CHUNK_BYTES
                wait_for(self._arrived, wanted)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def through(fleet: Fleet, client: Client, proxy: Proxy, patience: Patience = PATIENCE) -> Client:
    """The same device on its way through `proxy`."""
    assert isinstance(client.who, Identity)
    return fleet.client(replace(client.who, coordinator=proxy.address), patience)


def wait_for(count: Callable[[], int], wanted: int) -> None:
    """There is nothing that tells of another process's files but looking."""
    end = time.monotonic() + TIMEOUT
    while count() < wanted:
        assert time.monotonic() < end
        time.sleep(0.005)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def gathered(state: Path) -> int:
    """Bytes of unfinished updates at the coordinator."""
    return sum(map(size, partials(state)))


def partials(state: Path) -> list[Path]:
    return files_of(state, "updates/*/*/*.partial")


def test_a_download_goes_on_where_it_broke(fleet: Fleet, tmp_path: Path) -> None:
    bundle = fleet.bundle(width=WIDTH)
    served = fleet.serve(bundle, "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    whole = ada.download(1)
    partial = tmp_path / "partial"
    proxy = Proxy(served.ready(), lambda: size(partial), down=[700_000, 900_000])
    assert through(fleet, ada, proxy).download(1, partial) == whole
    assert proxy.cuts == 2
    assert proxy.passed["down"] < len(whole) + 4 * wire.CHUNK_BYTES + HANDSHAKE


def test_a_download_goes_on_in_another_process(fleet: Fleet, tmp_path: Path) -> None:
    bundle = fleet.bundle(width=WIDTH)
    served = fleet.serve(bundle, "--min-devices", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    whole = ada.download(1)
    partial = tmp_path / "partial"
    proxy = Proxy(served.ready(), lambda: size(partial), down=[1_500_000])
    with pytest.raises(UnreachableError):
        through(fleet, ada, proxy, Patience(0, lambda _: None)).download(1, partial)
    kept = partial.stat().st_size
    assert kept > 900_000
    before = ada.traffic.received
    assert ada.download(1, partial) == whole
    assert ada.traffic.received - before < len(whole) - kept + 1000
    assert not partial.exists()

    # What was kept of another generalist is no beginning of this one.
    partial.write_bytes(bytes(32) + whole[:500_000])
    assert ada.download(1, partial) == whole
    partial.write_bytes(b"short")
    assert ada.download(1, partial) == whole
    damaged = bytearray(whole)
    damaged[1000] ^= 1
    partial.write_bytes(sha256(whole).digest() + damaged[:500_000])
    assert ada.download(1, partial) == whole


def test_an_upload_goes_on_where_it_broke(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=WIDTH)
    served = fleet.serve(bundle, "--min-devices", "1", "--rounds", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    update = train(bundle, ada.download(1), 1, 1)
    proxy = Proxy(served.ready(), lambda: gathered(fleet.state), up=[700_000, 900_000])
    assert through(fleet, ada, proxy).upload(header(1), update).accepted
    assert proxy.cuts == 2
    assert proxy.passed["up"] < len(update) + 4 * wire.CHUNK_BYTES + HANDSHAKE
    final = check_in_until(ada, pb.CheckInReply.FINISH)
    got = wire.decode(bundle.manifest, ada.download(final.round))["generalist"]
    assert got.tobytes() == mean_of(bundle, [update]).tobytes()
    until(lambda: not partials(fleet.state), "they stay")


def test_a_device_has_one_unfinished_update(fleet: Fleet) -> None:
    """Also in asynchronous rounds, of which many are there at once."""
    bundle = fleet.bundle(width=WIDTH)
    served = fleet.serve(bundle, "--asynchronous", "1", "--rounds", "9")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    for number in (1, 2):
        join_round(ada, ben)
        start = ada.download(number)
        proxy = Proxy(served.ready(), lambda: gathered(fleet.state), up=[700_000])
        with pytest.raises(UnreachableError):
            through(fleet, ada, proxy, Patience(0, lambda _: None)).upload(
                header(number), train(bundle, start, 1, number)
            )
        (unfinished,) = partials(fleet.state)
        assert unfinished.parts[-3].startswith(f"{number}-")
        assert ben.upload(header(number), train(bundle, start, 2, number)).accepted
        served.wait_for("round_closed", round=number)


def test_an_upload_outlives_a_kill_of_either_side(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=WIDTH)
    listen = f"127.0.0.1:{free_port()}"
    options = ("--min-devices", "2", "--rounds", "1", "--enrolment-port", "0")
    served = fleet.serve(bundle, *options, listen=listen)
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    updates = [train(bundle, start, seed, 1) for seed in range(2)]
    proxy = Proxy(listen, lambda: gathered(fleet.state), up=[1_500_000])
    with pytest.raises(UnreachableError):
        through(fleet, ada, proxy, Patience(0, lambda _: None)).upload(header(1), updates[0])
    served.kill()
    fleet.serve(bundle, *options, listen=listen).ready()
    again = through(fleet, ada, proxy)
    assert again.upload(header(1), updates[0], resume=True).accepted
    assert proxy.passed["up"] < len(updates[0]) + 2 * wire.CHUNK_BYTES + HANDSHAKE
    # Accepted already: not a byte of it is sent again.
    before = again.traffic.sent
    assert again.upload(header(1), updates[0], resume=True).accepted
    assert again.traffic.sent - before < 1000

    assert ben.upload(header(1), updates[1]).accepted
    final = check_in_until(ben, pb.CheckInReply.FINISH)
    got = wire.decode(bundle.manifest, ben.download(final.round))["generalist"]
    assert got.tobytes() == mean_of(bundle, updates).tobytes()


def parts(full: pb.UploadHeader, data: bytes) -> Iterator[pb.UploadPart]:
    yield pb.UploadPart(header=full)
    for piece in wire.chunks(data):
        yield pb.UploadPart(data=piece)


def test_what_is_kept_of_broken_uploads_is_bounded_and_checked(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=WIDTH)
    served = fleet.serve(bundle, "--min-devices", "1", "--rounds", "1")
    ada, eve = fleet.enrolled(served, bundle, "ada", "eve")
    join_round(ada, eve)
    good = train(bundle, ada.download(1), 1, 1)
    stub = coordinator_pb2_grpc.CoordinatorStub(connect(eve.who, PATIENCE).channel)

    def announced(payload: bytes, **fields: int) -> pb.UploadHeader:
        return header(1, total_bytes=len(payload), sha256=sha256(payload).digest(), **fields)

    def break_off(full: pb.UploadHeader, data: bytes) -> None:
        """Sends `data` and hangs up once it is on the coordinator's disk."""
        arrived = threading.Event()

        def endless() -> Iterator[pb.UploadPart]:
            yield from parts(full, data)
            arrived.wait(30)

        call = stub.Upload.future(endless(), timeout=30)
        while stub.UploadOffset(full).offset < len(data):
            pass
        call.cancel()
        arrived.set()

    # Of many beginnings only the latest is kept.
    for number in range(5):
        other = good[:-4] + number.to_bytes(4, "little")
        break_off(announced(other), other[:1_000_000])
    (kept,) = partials(fleet.state)
    assert kept.stat().st_size == 1_000_000

    # A beginning that is not there is asked for again, and held against nobody.
    with pytest.raises(grpc.RpcError) as broken:
        stub.Upload(parts(announced(good, offset=100), good[100:]), timeout=30)
    assert broken.value.code() == grpc.StatusCode.ABORTED

    # Nor is one that was damaged here.
    break_off(announced(good), b"\0" * 500_000)
    with pytest.raises(grpc.RpcError) as broken:
        stub.Upload(parts(announced(good, offset=500_000), good[500_000:]), timeout=30)
    assert broken.value.code() == grpc.StatusCode.ABORTED
    assert stub.UploadOffset(announced(good)).offset == 0

    # An offset beyond the end is refused.
    reply = stub.Upload(parts(announced(good, offset=len(good) + 1), b""), timeout=30)
    assert not reply.accepted
    assert "beyond" in reply.reason
    assert ada.upload(header(1), good).accepted
    served.wait_for("round_closed")
    check_in_until(ada, pb.CheckInReply.FINISH)
    until(lambda: not partials(fleet.state), "they stay")


def test_an_upload_takes_the_place_of_one_that_hangs(fleet: Fleet) -> None:
    """As when the device's network changed and only it knows."""
    bundle = fleet.bundle(width=WIDTH)
    served = fleet.serve(bundle, "--min-devices", "1", "--rounds", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    good = train(bundle, ada.download(1), 1, 1)
    full = header(1, total_bytes=len(good), sha256=sha256(good).digest())
    stub = coordinator_pb2_grpc.CoordinatorStub(connect(ada.who, PATIENCE).channel)
    go_on = threading.Event()

    def hanging() -> Iterator[pb.UploadPart]:
        yield from parts(full, good[:500_000])
        go_on.wait(30)

    hung = stub.Upload.future(hanging(), timeout=30)
    while stub.UploadOffset(full).offset < 500_000:
        pass
    assert ada.upload(header(1), good).accepted
    go_on.set()
    assert hung.exception().code() == grpc.StatusCode.ABORTED
    served.wait_for("round_closed")


def test_an_update_that_is_here_whole_is_not_sent_again(fleet: Fleet) -> None:
    """The connection broke after its last byte: the coordinator kept the file and could not say so,
    nor count it."""
    bundle = fleet.bundle(WIDTH)
    served = fleet.serve(bundle, "--min-devices", "1", "--rounds", "1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    update = train(bundle, ada.download(1), 0, 1)
    (place,) = (fleet.state / f"updates/1-{cohort}" for cohort in (served.listening["cohorts"]))
    place.mkdir(parents=True)
    kept = place / f"{ids(fleet.state)['ada']}-{sha256(update).hexdigest()}.safetensors"
    kept.write_bytes(update)
    sent = ada.traffic.sent
    assert ada.upload(header(1), update, resume=True).accepted
    assert ada.traffic.sent - sent < 1000
    served.wait_for("round_closed", updates=1)
    check_in_until(ada, pb.CheckInReply.FINISH)
    final = wire.encode(bundle.manifest, {"generalist": mean_of(bundle, [update])})
    assert ada.download(2) == final


def test_who_hangs_up_again_and_again_does_not_fill_the_disk(fleet: Fleet) -> None:
    """While a whole update is unpacked: it stays for when the device comes again, but only one."""
    bundle = fleet.bundle(width=WIDTH)
    served = fleet.serve(bundle, "--min-devices", "2", "--compression", "top-k")
    eve, ada = fleet.enrolled(served, bundle, "eve", "ada")
    join_round(eve, ada)
    size = wire.decode(bundle.manifest, eve.download(1))["generalist"].size
    stub = coordinator_pb2_grpc.CoordinatorStub(connect(eve.who, PATIENCE).channel)
    most = 0
    for index in range(25):
        step = np.zeros(size, np.float32)
        step[index] = 1
        payload = compress(pb.COMPRESSION_TOP_K, step)
        full = header(1, total_bytes=len(payload), sha256=sha256(payload).digest())
        full.compression = pb.COMPRESSION_TOP_K
        sent = threading.Event()

        def all_of_it(
            full: pb.UploadHeader = full, payload: bytes = payload, sent: threading.Event = sent
        ) -> Iterator[pb.UploadPart]:
            yield from parts(full, payload)
            sent.set()

        call = stub.Upload.future(all_of_it(), timeout=30)
        assert sent.wait(30)
        time.sleep(0.01)
        call.cancel()
        time.sleep(0.1)
        most = max(most, len(files_of(fleet.state, "updates/*/*.safetensors")))
    assert most <= 2, "the last one, and one that is being kept"
