"""Updates on their way in.

Each is gathered in a file of its own, so that memory does not grow with how many come at once, and
goes on after a break, or a restart of either side, at the byte where it stopped. A device has one
such file at a time, as large as its update may be; those of a round go when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from coordinator.cohorts import Cohort
from coordinator.limits import TooSlowError, Transfers
from coordinator.rounds import RefusedUpdateError
from coordinator.state import Device
from edge_runtime import compression, wire
from edge_runtime.connection import Traffic
from edge_runtime.errors import AdapterError
from edge_runtime.files import storage_errors
from protos import coordinator_pb2 as pb

T = TypeVar("T")


class BrokenUploadError(Exception):
    """An upload that does not count yet and may be taken up again; one line that says why."""


class Uploads:
    """Gathers the updates of one cohort. One event loop, one instance per State."""

    def __init__(
        self, *, cohort: Cohort, transfers: Transfers, traffic: Traffic, masked: bool
    ) -> None:
        """
        Args:
            masked: whether updates are masked, so that any bytes of the right number will do.
        """
        self._transfers = transfers
        self._cohort = cohort
        self._state = cohort.state
        self._traffic = traffic
        self._masked = masked
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._open: dict[str, asyncio.Timeout] = {}
        # Held while an update is in memory as a whole.
        self._unpacking = threading.Lock()

    def offset(self, device: str, header: pb.UploadHeader) -> int:
        """How many bytes of this update have come before a break."""
        path = self._state.partial(header.round, device, header.sha256)
        return path.stat().st_size if path.exists() else 0

    async def receive(
        self, device: Device, header: pb.UploadHeader, parts: AsyncIterator[pb.UploadPart]
    ) -> str:
        """Takes in the data that follows `header`, from its offset on, and checks the whole.

        An earlier upload of the device that is still open, as when only the device has noticed
        that the connection broke, is ended.

        Returns:
            The file, as a path below the state directory: durable, and counted by nobody yet.

        Raises:
            RefusedUpdateError: it is not what was announced, or not this bundle's shared tensors.
            BrokenUploadError: it ended early or was too slow, the bytes before the offset are not
                here, or another upload of the device took its place.
            StorageError: it cannot be written.
        """
        async with self._turn(device.id):
            path = self._state.begin_partial(header.round, device.id, header.sha256)
            try:
                async with self._transfers.turn() as moved:
                    with storage_errors(path):
                        await self._gather(path, header, parts, moved)
                return await _to_its_end(lambda: self._keep(path, device, header))
            except TooSlowError as error:
                raise BrokenUploadError(str(error)) from error
            except RefusedUpdateError:
                path.unlink(missing_ok=True)
                raise

    @contextlib.asynccontextmanager
    async def _turn(self, device: str) -> AsyncIterator[None]:
        """One upload at a time per device: the latest. An earlier one is cancelled."""
        if device in self._open:
            self._open[device].reschedule(0)
        scope = self._open[device] = asyncio.timeout(None)
        try:
            async with scope, self._turns[device]:
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise BrokenUploadError("another upload of this device took its place") from None
        finally:
            if self._open.get(device) is scope:
                del self._open[device]

    async def _gather(
        self,
        path: Path,
        header: pb.UploadHeader,
        parts: AsyncIterator[pb.UploadPart],
        moved: Callable[[int], None],
    ) -> None:
        """Writes what comes into the file, from the header's offset on, piece by piece."""
        with path.open("r+b", buffering=0) as file:
            if header.offset > file.seek(0, os.SEEK_END):
                raise BrokenUploadError("the bytes before the offset are not here")
            received = file.seek(file.truncate(header.offset))
            async for part in parts:
                self._traffic.receive(part)
                if part.WhichOneof("part") != "data":
                    raise RefusedUpdateError("something other than data follows the header")
                data = part.data  # each look at it is a copy
                moved(len(data))
                received += len(data)
                if received > header.total_bytes:
                    raise RefusedUpdateError(
                        f"more data came than the {header.total_bytes} bytes that were announced"
                    )
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
        if received < header.total_bytes:
            # So it ends when the connection breaks, too.
            raise BrokenUploadError(
                f"the upload is truncated: {received} of {header.total_bytes} bytes came"
            )

    def _keep(self, path: Path, device: Device, header: pb.UploadHeader) -> str:
        """Checks what was gathered, and makes it durable. Memory stays far below its size."""
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            if digest != header.sha256:
                if header.offset:  # what came before a break was lost on this side
                    path.unlink()
                    raise BrokenUploadError("the bytes before the offset are damaged")
                raise RefusedUpdateError("the data does not match the announced SHA-256")
            if header.compression:
                with self._unpacking:
                    path = self._unpack(path, device, header)
            elif not self._masked:
                wire.check(self._cohort.manifest_of(device), path)
            return self._state.keep_partial(path, header.round, device.id, header.sha256)
        except AdapterError as error:
            raise RefusedUpdateError(str(error)) from error
        except FileNotFoundError as error:
            raise BrokenUploadError(f"round {header.round} ended meanwhile") from error

    def _unpack(self, path: Path, device: Device, header: pb.UploadHeader) -> Path:
        """What an update would be that was not compressed, in a file beside it."""
        started = self._state.round(header.round)
        if started is None:
            raise FileNotFoundError
        file, _ = self._cohort.fitted(device, started)
        manifest = self._cohort.manifest_of(device)
        vectors = wire.decode(manifest, file.read_bytes())
        parts = wire.shared_parts(manifest)
        size = max(part.stop for part in parts.values())
        step = compression.decompress(header.compression, path.read_bytes(), size)
        with np.errstate(over="ignore"):
            for role, part in parts.items():
                vectors[role] += step[part]
        payload = wire.encode(manifest, vectors)
        wire.decode(manifest, payload)  # a sum may be beyond float32
        unpacked = path.with_suffix(".unpacked")
        with storage_errors(unpacked):
            unpacked.write_bytes(payload)
        path.unlink()
        return unpacked


async def _to_its_end(work: Callable[[], T]) -> T:
    """The result of `work`, run in a thread; cancelled, it still waits for the thread."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
