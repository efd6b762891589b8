"""The devices of `comigs bench coordinator`: a process of many, each with its own gRPC channel,
certificate and update. Driven by JSON lines on stdin, answers each with one on stdout.

They send messages that were serialized before, and look at nothing of what they download: a phone
would do that on its own processor, and here every device shares two cores with the coordinator. The
same objects send the same bytes to the coordinator and to the servers of `benchmarks.load_floor`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np

from edge_runtime import wire
from edge_runtime.protocol import NEWEST
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

COORDINATOR = f"/{pb.DESCRIPTOR.services_by_name['Coordinator'].full_name}"
FLOOR = "/comigs.bench.Floor"
WAIT_SECONDS = 30.0
# Between two check-ins of a device that polls.
POLL_SECONDS = 0.2
MOST_BREAKS = 10
# Nobody else on this machine has these connections to share.
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]

T = TypeVar("T")


class Updates:
    """What the devices upload: one payload but for its last number, which is the device's own."""

    def __init__(self, payload: bytes) -> None:
        self.size = len(payload)
        *self._first, last = wire.chunks(payload)
        self._last = last[:-4]
        self._digest = hashlib.sha256(payload[:-4])
        self._parts = [pb.UploadPart(data=data).SerializeToString() for data in self._first]

    def header(self, index: int, number: int) -> pb.UploadHeader:
        digest = self._digest.copy()
        digest.update(self._own(index))
        return pb.UploadHeader(
            round=number, total_bytes=self.size, sha256=digest.digest(), tokens=1
        )

    def parts(self, index: int, number: int) -> Iterator[bytes]:
        """Serialized `UploadPart`s."""
        yield pb.UploadPart(header=self.header(index, number)).SerializeToString()
        yield from self._parts
        yield pb.UploadPart(data=self._last + self._own(index)).SerializeToString()

    def raw(self, index: int) -> Iterator[bytes]:
        yield from self._first
        yield self._last + self._own(index)

    @staticmethod
    def _own(index: int) -> bytes:
        return np.array(index, "<f4").tobytes()


class Device:
    def __init__(self, index: int, identity: dict[str, str], updates: Updates) -> None:
        self._index = index
        self._identity = identity
        self._updates = updates
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def connect(self, service: str, address: str) -> None:
        who = self._identity
        credentials = grpc.ssl_channel_credentials(
            who["ca"].encode(), who["key"].encode(), who["certificate"].encode()
        )
        channel = grpc.aio.secure_channel(address, credentials, options=OPTIONS)
        self._channels[service] = channel
        await channel.channel_ready()

    async def check_in(self, wait: float = WAIT_SECONDS) -> pb.CheckInReply:
        stub = coordinator_pb2_grpc.CoordinatorStub(self._channels[COORDINATOR])
        return await stub.CheckIn(pb.CheckInRequest(wait_seconds=wait, protocol=NEWEST))

    async def told_to_train(self) -> int:
        """The round."""
        while (reply := await self.check_in()).action != pb.CheckInReply.TRAIN:
            await asyncio.sleep(0)
        return reply.round

    async def download(self, service: str, number: int) -> int:
        """How often it broke and was begun again, as a device does."""
        call = self._channels[service].unary_stream(f"{service}/Download", None, None)
        request = pb.DownloadRequest(round=number).SerializeToString()

        async def whole() -> None:
            async for _ in call(request):
                pass

        _, broken = await _persistently(whole)
        return broken

    async def upload(self, service: str, number: int) -> int:
        """Likewise."""
        call = self._channels[service].stream_unary(f"{service}/Upload", None, None)
        reply, broken = await _persistently(lambda: call(self._updates.parts(self._index, number)))
        if service == COORDINATOR and not (parsed := pb.UploadReply.FromString(reply)).accepted:
            raise RuntimeError(f"an update was refused: {parsed.reason}")
        return broken

    async def connect_raw(self, address: str) -> None:
        """For the same bytes without gRPC."""
        host, port = address.rsplit(":", 1)
        who = self._identity
        context = ssl.create_default_context(cadata=who["ca"])
        with tempfile.NamedTemporaryFile() as file:
            file.write((who["certificate"] + who["key"]).encode())
            file.flush()
            context.load_cert_chain(file.name)
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        self._raw = reader, writer

    async def upload_raw(self) -> None:
        reader, writer = self._raw
        for data in self._updates.raw(self._index):
            writer.write(data)
            await writer.drain()
        await reader.readexactly(1)
        writer.close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)


async def _persistently(attempt: Callable[[], Awaitable[T]]) -> tuple[T, int]:
    """What `attempt` returns in the end, and how often it broke before."""
    broken = 0
    while True:
        try:
            return await attempt(), broken
        except grpc.aio.AioRpcError:
            if broken == MOST_BREAKS:
                raise
            broken += 1
            await asyncio.sleep(1)


class Devices:
    """Does what each line on stdin asks for, with all devices at once."""

    def __init__(self) -> None:
        self._devices: list[Device] = []
        self._polls: list[tuple[float, float]] = []
        self._polling: list[asyncio.Task[None]] = []

    async def make(self, payload: str, identities: str, first: int, stop: int) -> None:
        updates = Updates(Path(payload).read_bytes())
        known = json.loads(Path(identities).read_text())
        self._devices = [Device(i, known[i], updates) for i in range(first, stop)]

    async def connect(self, service: str, address: str) -> None:
        await self._all(lambda device: device.connect(service, address))

    async def check_in(self) -> int:
        """The round that all are told to train in."""
        (number,) = set(await self._all(lambda device: device.told_to_train()))
        return number

    async def download(self, service: str, number: int) -> int:
        return sum(await self._all(lambda device: device.download(service, number)))

    async def upload(self, service: str, number: int) -> int:
        return sum(await self._all(lambda device: device.upload(service, number)))

    async def connect_raw(self, address: str) -> None:
        await self._all(lambda device: device.connect_raw(address))

    async def upload_raw(self) -> None:
        await self._all(lambda device: device.upload_raw())

    async def poll(self) -> None:
        """Lets each device check in all the time, and take part when it is told to."""
        self._polling = [asyncio.create_task(self._poll(device)) for device in self._devices]

    async def polled(self) -> list[tuple[float, float]]:
        """When each check-in since the last question began (monotonic), and its seconds."""
        for task in self._polling:
            if task.done():
                task.result()
        polls, self._polls = self._polls, []
        return polls

    async def _poll(self, device: Device) -> None:
        while True:
            began = time.monotonic()
            reply = await device.check_in(0)
            self._polls.append((began, time.monotonic() - began))
            if reply.action == pb.CheckInReply.TRAIN:
                await device.download(COORDINATOR, reply.round)
                await device.upload(COORDINATOR, reply.round)
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        for task in self._polling:
            task.cancel()
        await self._all(lambda device: device.close())

    async def _all(self, act: Callable[[Device], Awaitable[T]]) -> list[T]:
        return await asyncio.gather(*(act(device) for device in self._devices))


async def main() -> None:
    devices = Devices()
    while line := await asyncio.to_thread(sys.stdin.readline):
        command: dict[str, Any] = json.loads(line)
        result = await getattr(devices, command.pop("do"))(**command)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    await devices.close()


if __name__ == "__main__":
    asyncio.run(main())
