"""Floods, slow senders and idle connections do not keep honest devices from their round."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import psutil
import pytest
from coordinator_help import (
    TIMEOUT,
    Fleet,
    Served,
    header,
    in_parallel,
    join_round,
    train,
)

from coordinator.limits import OTHER_FILES, Limits, _close_excess, raise_file_limit
from edge_runtime.client import Client
from edge_runtime.errors import AddressError
from edge_runtime.identity import Identity
from edge_runtime.protocol import NEWEST
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

ELSEWHERE = "127.0.0.2"
# As an HTTP/2 client begins: its preface, and settings that change nothing.
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
CONNECTIONS = 10_000 if os.environ.get("COMIGS_SOAK") else 1_000


def port_of(served: Served) -> int:
    return int(served.ready().rpartition(":")[2])


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), TIMEOUT, source_address=(source, 0))


def secured(plain: socket.socket, identity: Identity) -> ssl.SSLSocket:
    context = ssl.create_default_context(cadata=identity.ca)
    context.set_alpn_protocols(["h2"])
    with tempfile.NamedTemporaryFile() as file:
        file.write((identity.certificate + identity.key).encode())
        file.flush()
        context.load_cert_chain(file.name)
    return context.wrap_socket(plain, server_hostname="localhost")


def is_closed(connection: socket.socket) -> bool:
    """Reads until the other side ends; False if it does not within TIMEOUT."""
    connection.settimeout(TIMEOUT)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def ended(connections: list[socket.socket]) -> int:
    """How many the other side has ended by now."""
    count = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            count += not connection.recv(65536)
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def stub_of(client: Client) -> coordinator_pb2_grpc.CoordinatorStub:
    return client._stub


@contextlib.contextmanager
def many(port: int, count: int, source: str = ELSEWHERE) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(port, source)) for _ in range(count)]


def finish_round(bundle: object, clients: list[Client]) -> None:
    """All take part in round 1 and are accepted."""
    join_round(*clients)
    payloads = [train(bundle, c.download(1), i, 1) for i, c in enumerate(clients)]  # type: ignore[arg-type]
    replies = in_parallel(
        *(
            lambda c=client, p=payload: c.upload(header(1), p)
            for client, payload in zip(clients, payloads, strict=True)
        )
    )
    assert all(reply.accepted for reply in replies)


def test_a_handshake_that_does_not_go_on_is_ended(fleet: Fleet) -> None:
    served = fleet.serve(fleet.bundle(), "--handshake-timeout", "0.5")
    with connect(port_of(served)) as silent, connect(port_of(served)) as slow:
        slow.sendall(b"\x16\x03\x01")  # the beginning of a TLS record
        assert is_closed(silent)
        assert is_closed(slow)


def test_a_connection_that_never_speaks_http2_is_ended(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--handshake-timeout", "0.5")
    (client,) = fleet.enrolled(served, bundle, "a")
    assert isinstance(client.who, Identity)
    with secured(connect(port_of(served)), client.who) as mute:
        assert is_closed(mute)


def test_an_idle_connection_is_ended_and_its_device_comes_back(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--max-idle", "0.5")
    (client,) = fleet.enrolled(served, bundle, "a")
    assert isinstance(client.who, Identity)
    client.check_in(0)
    with secured(connect(port_of(served)), client.who) as idle:
        idle.sendall(HTTP2)
        assert is_closed(idle)
    client.check_in(0)


def test_a_connection_does_not_last_for_ever(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--max-age", "0.3")
    (client,) = fleet.enrolled(served, bundle, "a")
    port, used = port_of(served), set()

    def has_changed() -> bool:
        client.check_in(0)
        connections = psutil.Process().net_connections("tcp")
        used.update(c.laddr.port for c in connections if c.raddr and c.raddr.port == port)
        return len(used) > 1

    eventually(has_changed)


def test_connections_beyond_the_limit_are_refused_and_those_before_it_work(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--max-connections", "3")
    (client,) = fleet.enrolled(served, bundle, "a")
    client.check_in(0)
    with many(port_of(served), 10) as flood:
        eventually(lambda: ended(flood) >= 8)
        client.check_in(0)


def test_an_address_keeps_only_so_many_connections(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--max-connections-per-address", "20")
    clients = fleet.enrolled(served, bundle, "a", "b")
    for client in clients:
        client.check_in(0)
    with many(port_of(served), 50) as flood:
        closed = served.wait_for("connections_closed", address=ELSEWHERE)["connections"]
        assert closed <= 30
        eventually(lambda: ended(flood) == 30)
        # Other addresses have their own, and 20 are still not too many.
        finish_round(bundle, clients)
        assert ended(flood) == 30


LISTENER = """
import socket, sys
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
accepted = [listening.accept() for _ in range(int(sys.argv[1]))]
print("accepted", flush=True)
sys.stdin.read()
"""


def test_connections_of_another_coordinator_are_not_counted() -> None:
    """All of a machine may have the same `--listen`."""
    command = [sys.executable, "-c", LISTENER, "4"]
    with (
        contextlib.ExitStack() as stack,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        assert other.stdout
        ports = [listening.getsockname()[1], int(other.stdout.readline())]
        for port in ports:
            for _ in range(4):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        accepted = [stack.enter_context(listening.accept()[0]) for _ in range(4)]
        assert other.stdout.readline() == "accepted\n"
        assert not _close_excess(ports, 4, {})
        assert sum(_close_excess(ports, 3, {}).values()) == 1
        for each in accepted:
            each.settimeout(0.1)
        assert sum(_is_over(each) for each in accepted) == 1
        other.kill()


def _is_over(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def test_calls_that_come_at_once_wait_while_the_coordinator_is_busy() -> None:
    """gRPC by itself ends some of what is more than a thousand with a bare CANCELLED."""
    calls, channels = 1500, 50

    async def answer_late() -> set[grpc.StatusCode]:
        async def answer(request: bytes, _: object) -> bytes:
            return request

        server = grpc.aio.server(options=Limits().channel_options())
        handlers = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_registered_method_handlers("Busy", handlers)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        options = [("grpc.use_local_subchannel_pool", 1)]
        with contextlib.ExitStack() as stack:
            target = f"127.0.0.1:{port}"
            opened = [
                stack.enter_context(grpc.insecure_channel(target, options)) for _ in range(channels)
            ]
            made = [
                opened[index % channels]
                .unary_unary("/Busy/Call", request_serializer=bytes, response_deserializer=bytes)
                .future(b"", timeout=TIMEOUT)
                for index in range(calls)
            ]
            time.sleep(1)  # the event loop does not run meanwhile, so nobody looks at them
            codes = await asyncio.to_thread(lambda: {call.code() for call in made})
        await server.stop(None)
        return codes

    assert asyncio.run(answer_late()) == {grpc.StatusCode.OK}


def test_a_device_that_calls_too_often_is_slowed_down_and_others_are_not(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--calls-per-second", "1")
    flooding, *clients = fleet.enrolled(served, bundle, "flood", "a", "b")
    stub, request = stub_of(flooding), pb.CheckInRequest(protocol=NEWEST)
    for _ in range(50):
        stub.CheckIn(request, timeout=TIMEOUT)
    # From now on one per second, for at most two seconds.
    calls = [stub.CheckIn.future(request, timeout=TIMEOUT) for _ in range(8)]
    codes = [call.code() for call in calls]
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes.count(grpc.StatusCode.OK) <= 5
    finish_round(bundle, clients)


def test_a_device_has_only_so_many_calls_open(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "3")
    greedy, other = fleet.enrolled(served, bundle, "greedy", "other")
    assert isinstance(greedy.who, Identity)
    again = fleet.client(greedy.who)  # a connection has that limit, too
    request = pb.CheckInRequest(wait_seconds=TIMEOUT, protocol=NEWEST)
    # Any of the nine may come last.
    calls = [stub_of(client).CheckIn.future(request) for client in [again, *[greedy] * 8]]
    eventually(lambda: any(call.done() for call in calls))
    assert [call.code() for call in calls if call.done()] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
    other.check_in(0)
    for call in calls:
        call.cancel()


def trickle(client: Client, payload: bytes, size: int) -> tuple[grpc.Call, threading.Event]:
    """An upload of which only the first bytes come; set the event to end it."""
    done = threading.Event()
    whole = header(1, total_bytes=len(payload), sha256=b"0" * 32)

    def parts() -> Iterator[pb.UploadPart]:
        yield pb.UploadPart(header=whole)
        for at in range(0, len(payload), size):
            yield pb.UploadPart(data=payload[at : at + size])
            if done.wait(0.2):
                return

    return stub_of(client).Upload.future(parts(), timeout=4 * TIMEOUT), done


def test_slow_uploads_are_broken_off_and_honest_ones_get_their_turn(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(
        bundle, "--transfers", "2", "--min-devices", "4", "--least-rate", "1e6", "--rounds", "1"
    )
    slow = fleet.enrolled(served, bundle, "s", "t")
    honest = fleet.enrolled(served, bundle, "a", "b", "c", "d")
    join_round(*slow, *honest)
    payloads = [train(bundle, c.download(1), i, 1) for i, c in enumerate([*slow, *honest])]
    held = [trickle(c, p, 1) for c, p in zip(slow, payloads, strict=False)]
    # They hold both turns until they are broken off; then the others come through.
    replies = in_parallel(
        *(
            lambda c=c, p=p: c.upload(header(1), p)
            for c, p in zip(honest, payloads[2:], strict=True)
        )
    )
    assert all(reply.accepted for reply in replies)
    for call, done in held:
        assert call.code() == grpc.StatusCode.ABORTED
        assert "slower than" in str(call.details())
        done.set()


def test_a_slow_download_is_broken_off(fleet: Fleet) -> None:
    bundle = fleet.bundle(width=2_000_000)
    served = fleet.serve(bundle, "--transfers", "1", "--least-rate", "1e9")
    lazy, other = fleet.enrolled(served, bundle, "lazy", "other")
    chunks = iter(stub_of(lazy).Download(pb.DownloadRequest(round=1), timeout=4 * TIMEOUT))
    next(chunks)
    other.download(1)  # has its turn once the lazy one is broken off
    with pytest.raises(grpc.RpcError) as error:
        list(chunks)
    assert error.value.code() == grpc.StatusCode.ABORTED


def test_too_few_files_are_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    for most, connections in (
        (OTHER_FILES + 2, 1),
        (OTHER_FILES + 9, 4),
        (resource.RLIM_INFINITY, 9),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, most=most: (64, most))
        assert raise_file_limit(9) == connections
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, OTHER_FILES + 1))
    with pytest.raises(AddressError, match="raise its hard limit"):
        raise_file_limit(9)


def test_a_round_goes_on_among_idle_connections(fleet: Fleet) -> None:
    """Connected and silent, before TLS and after it, and at the enrolment port."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "3")
    clients = fleet.enrolled(served, bundle, "a", "b", "c")
    identity = clients[0].who
    assert isinstance(identity, Identity)
    enrolment = int(str(served.listening["enrolment"]).rpartition(":")[2])
    before = psutil.Process(served.process.pid).memory_info().rss
    with (
        many(port_of(served), CONNECTIONS * 6 // 10),
        many(enrolment, CONNECTIONS * 3 // 10),
        many(port_of(served), CONNECTIONS // 10) as authenticated,
        contextlib.ExitStack() as stack,
    ):
        for plain in authenticated:
            with contextlib.suppress(OSError):
                stack.enter_context(secured(plain, identity)).sendall(HTTP2)
        finish_round(bundle, clients)
        served.wait_for("round_closed")
        grown = psutil.Process(served.process.pid).memory_info().rss - before
    print(f"among {CONNECTIONS} connections the coordinator grew by {grown >> 20} MiB")
    # How many are open at once depends on how fast the machine is.
    assert grown < 64 * 1024**2 + CONNECTIONS * 40 * 1024
