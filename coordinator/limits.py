"""How much of the coordinator one caller, one address and all of them together may take.

Connections are gRPC's to accept, and it has no limit per address; so `watch_connections` looks at
the kernel's list of them and closes what is too many. A caller without a certificate gets no
further than the handshake, which has a time limit. Everything else is counted per device, which its
certificate names.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import os
import resource
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime import protocol
from edge_runtime.errors import AddressError

# File descriptors for everything that is no connection: updates that come in, the database, files.
OTHER_FILES = 512
# Calls that a device may have open. An honest one has one or two.
CALLS_AT_ONCE = 8
# On one connection; gRPC is not exact about it and ends calls that it should have held back.
STREAMS = 4 * CALLS_AT_ONCE
# Calls that a device may make before it is slowed down.
BURST = 50
# A device is slowed down by so much at most; then its calls are refused.
LONGEST_DELAY_SECONDS = 2.0
# Of the transfers at once, so many are new: more of fast ones would only keep calls waiting. One
# that takes longer than this lets another begin.
BEGINNING = 4
BEGINNING_SECONDS = 1.0
# Seconds that a transfer may lag behind the least rate.
GRACE_SECONDS = 10.0
# Calls that are open when their connection is too old have this long at least.
GRACE_LEAST = 600.0
# A transfer's time limit is put off so often: it may end that much too early.
REARM_SECONDS = 1.0
# What a device may send before anybody looks at it, of each call.
WINDOW_BYTES = 16 * 1024
# From a connection at once. Each keeps what it once needed, which gRPC rounds up: from 12 KiB on to
# 64, below that to 16.
READ_BYTES = 12 * 1024 - 1
# The longest that a call waits until it is looked at. gRPC's own limits are 30 seconds and about a
# thousand calls, and it ends what is beyond them with a bare CANCELLED.
QUEUE_SECONDS = 600
LOOK_SECONDS = 1.0
ESTABLISHED = "01"
# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """As `comigs serve` takes them."""

    connections: int = 4096
    """To each port, in all."""
    connections_per_address: int = 2048
    """To both ports together, from one IP address."""
    handshake_seconds: float = 10.0
    """For TLS and the first HTTP/2 settings."""
    idle_seconds: float = 300.0
    """After so long without a call a connection is closed; a device opens another when it needs."""
    age_seconds: float = 3600.0
    """After about so long a connection gets no more calls and ends with those that are open."""
    calls_per_second: float = 10.0
    """Of one device on average; after BURST, they are slowed down to that."""
    transfers: int = 16
    """Uploads at once, and downloads likewise; others wait for their turn."""
    least_rate: float = 8192.0
    """Bytes per second of a transfer on average, once it has its turn; a slower one is broken
    off, and may go on from there."""

    def channel_options(
        self, *, shared: bool = False, streams: int = STREAMS
    ) -> list[tuple[str, Any]]:
        """For gRPC's servers.

        Args:
            shared: whether other processes may listen on the same port.
            streams: calls at once on a connection.
        """
        handshake = int(1000 * self.handshake_seconds)
        return [
            # Anything larger is an attack or a mistake; `Calls` holds each message to its limit.
            ("grpc.max_receive_message_length", protocol.LARGEST),
            ("grpc.max_send_message_length", protocol.LARGEST_LIST),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.max_concurrent_streams", streams),
            ("grpc.max_allowed_incoming_connections", self.connections),
            ("grpc.server.max_pending_requests", STREAMS * self.connections),
            ("grpc.server.max_pending_requests_hard_limit", STREAMS * self.connections + 1),
            ("grpc.server_max_unrequested_time_in_server", QUEUE_SECONDS),
            ("grpc.server_handshake_timeout_ms", handshake),
            ("grpc.http2.settings_timeout", handshake),
            ("grpc.max_connection_idle_ms", int(1000 * self.idle_seconds)),
            ("grpc.max_connection_age_ms", int(1000 * self.age_seconds)),
            # Calls that are open then end after as long again; transfers can be gone on with.
            ("grpc.max_connection_age_grace_ms", int(1000 * max(self.age_seconds, GRACE_LEAST))),
            # Left to itself gRPC lets a fast sender fill megabytes of memory per call.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
            ("grpc.experimental.tcp_max_read_buffer_size", READ_BYTES),
            # Two coordinators on one port each get half of the devices.
            ("grpc.so_reuseport", int(shared)),
            # Devices vanish without a word: notice within about 30 seconds.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]


class TooSlowError(Exception):
    """A transfer is broken off; the message is one line that says why."""


class Transfers:
    """Transfers in one direction."""

    def __init__(self, limits: Limits) -> None:
        self._free = asyncio.Semaphore(limits.transfers)
        self._beginning = asyncio.Semaphore(BEGINNING)
        self._rate = limits.least_rate

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Callable[[int], None]]:
        """Waits until there is room for another one, which the body is.

        Yields:
            What to tell of every byte that has moved.

        Raises:
            TooSlowError: too few have.
        """
        async with self._free, self._begin():
            due = armed = asyncio.get_running_loop().time() + GRACE_SECONDS
            scope = asyncio.timeout_at(due)

            def moved(count: int) -> None:
                nonlocal due, armed
                due += count / self._rate
                if due > armed + REARM_SECONDS:  # each time costs something
                    armed = due
                    scope.reschedule(due)

            try:
                async with scope:
                    yield moved
            except TimeoutError:
                if not scope.expired():
                    raise
                raise TooSlowError(f"slower than {self._rate:.0f} bytes per second") from None

    @contextlib.asynccontextmanager
    async def _begin(self) -> AsyncIterator[None]:
        """Around a transfer: waits until another one may begin."""
        await self._beginning.acquire()
        loop = asyncio.get_running_loop()
        over = loop.call_later(BEGINNING_SECONDS, self._beginning.release)
        try:
            yield
        finally:
            if loop.time() < over.when():
                over.cancel()
                self._beginning.release()


class Pace:
    """Slows down whoever calls too often: the generic cell rate algorithm (ITU-T I.371)."""

    def __init__(self, per_second: float) -> None:
        self._interval = 1 / per_second
        self._next: dict[str, float] = {}

    def delay(self, who: str) -> float | None:
        """Seconds until the call that `who` makes now may be answered; None refuses it."""
        now = time.monotonic()
        due = max(self._next.get(who, 0.0), now - BURST * self._interval)
        if due - now > LONGEST_DELAY_SECONDS:
            return None
        self._next[who] = due + self._interval
        return max(0.0, due - now)


def raise_file_limit(connections: int) -> int:
    """Lets this process open as many files as it may.

    Returns:
        The connections to each of two ports that fit: `connections`, or fewer.

    Raises:
        AddressError: none does.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < OTHER_FILES + 2:
        raise AddressError(
            f"no connection could be taken: {OTHER_FILES} files are for other things, and this "
            f"process may open {most}; raise its hard limit (ulimit -Hn, or LimitNOFILE of systemd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY:
        return connections
    return min(connections, (most - OTHER_FILES) // 2)


def share_heap() -> None:
    """Lets all threads allocate from one heap: glibc gives each its own, which keeps what its
    thread once needed. What is as large as a vector lies outside and goes back when it is freed."""
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, LARGE_BYTES)


async def watch_connections(
    ports: Collection[int], most: int, on_closed: Callable[[str, int], None]
) -> None:
    """Closes the latest connections of an address that has more than `most` to `ports`.

    Runs until it is cancelled.

    Args:
        on_closed: is told the address, and how many.
    """
    known: dict[str, int] = {}
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        closed: Mapping[str, int] = {}
        with contextlib.suppress(OSError):  # no file can be opened: the next look may see more
            closed = await asyncio.to_thread(_close_excess, ports, most, known)
        for address, count in closed.items():
            on_closed(_readable(address), count)


def _close_excess(ports: Collection[int], most: int, known: dict[str, int]) -> dict[str, int]:
    """One look.

    Args:
        known: socket -> when it was first seen, as a number that grows; updated.

    Returns:
        Address -> how many of its connections were closed.
    """
    inodes: defaultdict[str, list[str]] = defaultdict(list)
    for address, inode in _connections(ports):
        inodes[address].append(inode)
    present = {inode for each in inodes.values() for inode in each}
    for gone in known.keys() - present:
        del known[gone]
    turn = max(known.values(), default=0) + 1
    for inode in present:
        known.setdefault(inode, turn)
    many = {address: each for address, each in inodes.items() if len(each) > most}
    # Others of this machine may serve the same port; their connections are theirs to count.
    own = _own_sockets() if many else set()
    excess: dict[str, str] = {}
    for address, each in many.items():
        for inode in sorted(own.intersection(each), key=known.__getitem__)[most:]:
            excess[inode] = address
    closed: defaultdict[str, int] = defaultdict(int)
    if excess:
        for inode in _shut_down(excess):
            closed[excess[inode]] += 1
    return closed


def _connections(ports: Collection[int]) -> Iterator[tuple[str, str]]:
    """Remote address and socket of each connection of this machine to `ports`, as the kernel
    writes them."""
    wanted = tuple(f":{port:04X}" for port in ports)
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), Path(f"/proc/self/net/{table}").open() as file:
            for line in file:
                _, local, remote, state, _, _, _, _, _, inode, *_ = line.split(maxsplit=10)
                if state == ESTABLISHED and local.endswith(wanted):
                    yield remote.partition(":")[0], inode


def _own_sockets() -> set[str]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(_inode(descriptor))
    return found


def _shut_down(inodes: Collection[str]) -> Iterator[str]:
    """Ends those connections that are this process's; gRPC then sees that they broke."""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if _inode(descriptor) in inodes:
                # A duplicate, behind which nobody can put another connection meanwhile.
                with socket.socket(fileno=os.dup(int(descriptor))) as duplicate:
                    inode = _inode(str(duplicate.fileno()))
                    if inode in inodes:
                        duplicate.shutdown(socket.SHUT_RDWR)
                        yield inode


def _inode(descriptor: str) -> str:
    """Of the socket behind a file descriptor; "" if it is none."""
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    return name[len("socket:[") : -1] if name.startswith("socket:[") else ""


def _readable(address: str) -> str:
    """An IP address that the kernel wrote as hexadecimal words in its own byte order."""
    words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
    found = ipaddress.ip_address(b"".join(words))
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)
