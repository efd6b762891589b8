"""Updates on their way in.

Each is gathered in a file of its own, so that memory does not grow with how many come at once, and
goes on after a break, or a restart of either side, at the byte where it stopped. A device has one
such file at a time, as large as its update may be; those of a round go when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import io
import os
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from coordinator import direct
from coordinator.cohorts import Cohort
from coordinator.commits import to_its_end
from coordinator.limits import TooSlowError, Transfers
from coordinator.policy import RefusedUpdateError
from coordinator.tables import Device
from coordinator.update_rows import round_errors
from edge_runtime import compression, wire
from edge_runtime.connection import Traffic
from edge_runtime.errors import AdapterError, StorageError
from protos import coordinator_pb2 as pb

# Written at once; as much more of an update may wait for that.
PIECES = 4
# What comes more slowly is written after so long all the same: a kill then costs little of it.
IDLE_SECONDS = 0.2
READ_BYTES = 1024**2
# An UploadPart that is nothing but data begins so: field 2, of variable length.
DATA = 0x12

Part = pb.UploadPart | memoryview
"""What an upload consists of; memoryview: the data of a part that is nothing else."""


class BrokenUploadError(Exception):
    """An upload that does not count yet and may be taken up again; one line that says why."""


def read_part(content: bytes) -> Part:
    """A serialized UploadPart. Its data is not copied, as protobuf would do twice.

    Raises:
        DecodeError: it is none.
    """
    if content[:1] == bytes([DATA]):
        size, shift, at = 0, 0, 1
        while at < min(len(content), 6):
            size |= (content[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if content[at - 1] < 0x80:
                if at + size == len(content):
                    return memoryview(content)[at:]
                break
    return pb.UploadPart.FromString(content)


class Gathering:
    """The file of an update that is coming in. A thread writes what has come while more comes."""

    def __init__(self, file: io.FileIO, offset: int, thread: Executor) -> None:
        """What is in the file beyond `offset` does not count."""
        file.truncate(offset)
        file.seek(0)
        self._known = file if offset else None
        self._thread = thread
        self.content = wire.Incoming()
        """What it is, once it has ended."""
        self._sha256 = hashlib.sha256()
        self._pieces: list[memoryview] = []
        self._writing: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failure: BaseException | None = None
        # Whether all that has come is in the file.
        self._settled = True
        self._file = direct.Appending(file)
        if offset:
            self._start()

    async def add(self, data: memoryview) -> None:
        """Takes what follows; waits while much of it is in memory.

        Raises:
            OSError: it cannot be written.
        """
        self._pieces.append(data)
        self._settled = False
        if self._writing is None and self._timer is None:
            self._settle_when_idle()
        while len(self._pieces) >= PIECES and self._failure is None:
            if self._writing is None:
                self._start()
            else:
                await asyncio.wait([self._writing])
        if self._failure is not None:
            raise self._failure

    async def end(self) -> bytes:
        """SHA-256 of all that has come, once it is written. Cancelled, it still waits for that.

        Raises:
            OSError: it cannot be written.
        """
        cancelled: asyncio.CancelledError | None = None
        self._stop_timer()
        while self._failure is None and not (self._settled and self._writing is None):
            writing = self._writing or self._start(True)
            try:
                await asyncio.wait([writing])
            except asyncio.CancelledError as error:
                cancelled = error
        self._file.close()
        if cancelled is not None:
            raise cancelled
        if self._failure is not None:
            raise self._failure
        return self._sha256.digest()

    def _settle_when_idle(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._start, True)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, settle: bool = False) -> asyncio.Future[bool]:
        """Begins to write what is there; with `settle`, also what fills no block."""
        self._stop_timer()
        pieces, self._pieces = self._pieces, []
        loop = asyncio.get_running_loop()
        writing = loop.run_in_executor(self._thread, self._write, pieces, settle)
        self._writing = writing
        writing.add_done_callback(self._written)
        return writing

    def _written(self, writing: asyncio.Future[bool]) -> None:
        self._writing, self._failure = None, writing.exception()
        if self._failure is None:
            self._settled = writing.result() and not self._pieces
            if self._pieces:
                self._start()
            elif not self._settled:
                self._settle_when_idle()

    def _write(self, pieces: list[memoryview], settle: bool) -> bool:
        """In the thread. Returns `settle`."""
        if self._known is not None:  # before the offset
            while known := self._known.read(READ_BYTES):
                self._look(memoryview(known))
            self._known = None
        for piece in pieces:
            self._look(piece)
        self._file.write(pieces)
        if settle:
            self._file.settle()
        return settle

    def _look(self, piece: memoryview) -> None:
        self._sha256.update(piece)
        self.content.add(piece)


class Uploads:
    """Gathers the updates of one cohort. One event loop, one instance per State."""

    def __init__(
        self,
        *,
        cohort: Cohort,
        transfers: Transfers,
        traffic: Traffic,
        masked: bool,
        thread: Executor,
    ) -> None:
        """
        Args:
            thread: writes what comes.
            masked: whether updates are masked, so that any bytes of the right number will do.
        """
        self._transfers = transfers
        self._cohort = cohort
        self._state = cohort.state
        self._traffic = traffic
        self._masked = masked
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._open: dict[str, asyncio.Timeout] = {}
        self._thread = thread
        # Device -> round and file of the last update that is here whole, and whose caller had gone.
        self._left: dict[str, tuple[int, str]] = {}
        self._checkers: dict[str, wire.Checker] = {}
        # Held while an update is in memory as a whole.
        self._unpacking = threading.Lock()

    def offset(self, device: str, header: pb.UploadHeader) -> int:
        """How many bytes of this update have come before a break."""
        if self._state.kept(header.round, device, header.sha256) is not None:
            return header.total_bytes
        path = self._state.partial(header.round, device, header.sha256)
        return path.stat().st_size if path.exists() else 0

    async def receive(
        self,
        device: Device,
        announced: Callable[[], Awaitable[pb.UploadHeader]],
        parts: AsyncIterator[Part],
    ) -> None:
        """Takes in the data that follows a header, from its offset on, checks the whole, and has it
        counted, if it is not yet.

        Waits for its turn before anything else: many may come at once.

        An earlier upload of the device that is still open, as when only the device has noticed
        that the connection broke, is ended. Nothing is taken in of an update that is here whole, as
        when the connection broke after its last byte.

        Args:
            announced: receives the header.

        Raises:
            What `announced` and `Counting.accept` raise.
            RefusedUpdateError: it could not count, is not what was announced, or not this bundle's
                shared tensors.
            BrokenUploadError: it ended early or was too slow, the bytes before the offset are not
                here, another upload of the device took its place, or its round went meanwhile.
            StorageError: it cannot be written.
        """
        async with self._turn(device.id):
            path: Path | None = None
            try:
                with contextlib.ExitStack() as held:
                    async with self._transfers.turn() as moved:
                        header = await announced()
                        path = self._state.partial(header.round, device.id, header.sha256)
                        if not await self._cohort.counting.check_update(device, header):
                            return
                        kept = self._state.kept(header.round, device.id, header.sha256)
                        if kept is None:
                            with round_errors(path):
                                self._state.begin_partial(path)
                                file = held.enter_context(_alone(path))
                                gathered = await self._gather(file, header, parts, moved)
                    if kept is None:
                        kept = await to_its_end(
                            functools.partial(self._keep, path, device, header, *gathered)
                        )
                    await self._cohort.counting.accept(device, header, kept)
            except asyncio.CancelledError:
                if path is not None:
                    with contextlib.suppress(StorageError):
                        self._leave(device.id, header)
                raise
            except TooSlowError as error:
                raise BrokenUploadError(str(error)) from error
            except FileNotFoundError as error:  # its files went with the round
                raise BrokenUploadError(f"round {header.round} ended meanwhile") from error
            except RefusedUpdateError:
                if path is not None:
                    path.unlink(missing_ok=True)
                raise

    def _leave(self, device: str, header: pb.UploadHeader) -> None:
        """The caller has gone. What is here whole stays for when it comes again; not what it left
        so before: whoever hangs up again and again would fill the disk."""
        kept = self._state.kept(header.round, device, header.sha256)
        if kept is None:
            return
        number, before = self._left.get(device, (0, kept))
        self._left[device] = header.round, kept
        if before != kept:
            counted = self._state.update(number, device)
            if counted is None or counted.file != before:
                self._state.drop_file(before)

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
        file: io.FileIO,
        header: pb.UploadHeader,
        parts: AsyncIterator[Part],
        moved: Callable[[int], None],
    ) -> tuple[bytes, wire.Incoming]:
        """Writes what comes into the file, from the header's offset on.

        Returns:
            SHA-256 of the whole, and what it is.
        """
        received = header.offset
        if received > file.seek(0, os.SEEK_END):
            raise BrokenUploadError("the bytes before the offset are not here")
        gathering = Gathering(file, received, self._thread)
        try:
            async for part in parts:
                if isinstance(part, pb.UploadPart):
                    raise RefusedUpdateError("something other than data follows the header")
                self._traffic.received += memoryview(part.obj).nbytes
                moved(len(part))
                received += len(part)
                if received > header.total_bytes:
                    raise RefusedUpdateError(
                        f"more data came than the {header.total_bytes} bytes announced"
                    )
                await gathering.add(part)
        finally:  # however it ended, the device may go on from here
            digest = await gathering.end()
        if received < header.total_bytes:
            # So it ends when the connection breaks, too.
            raise BrokenUploadError(
                f"the upload is truncated: {received} of {header.total_bytes} bytes came"
            )
        return digest, gathering.content

    def _keep(
        self,
        path: Path,
        device: Device,
        header: pb.UploadHeader,
        digest: bytes,
        content: wire.Incoming,
    ) -> str:
        """Checks what was gathered, of that SHA-256, and makes it durable. Memory stays far below
        its size."""
        try:
            if digest != header.sha256:
                if header.offset:  # what came before a break was lost on this side
                    path.unlink()
                    raise BrokenUploadError("the bytes before the offset are damaged")
                raise RefusedUpdateError("the data does not match the announced SHA-256")
            if header.compression:
                with self._unpacking:
                    path = self._unpack(path, device, header)
            elif not self._masked:
                self._checker(device).end(content, path)
            return self._state.keep_partial(path, header.round, device.id, header.sha256)
        except AdapterError as error:
            raise RefusedUpdateError(str(error)) from error

    def _checker(self, device: Device) -> wire.Checker:
        contract = device.contract_sha256
        if contract not in self._checkers:
            self._checkers[contract] = wire.Checker(self._cohort.manifest_of(device))
        return self._checkers[contract]

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
        with round_errors(unpacked):
            unpacked.write_bytes(payload)
        path.unlink()
        return unpacked


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[io.FileIO]:
    """The file, which no other process gathers into meanwhile.

    Raises:
        BrokenUploadError: one does.
        OSError: it cannot be opened.
    """
    with path.open("r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:  # it has got its final place meanwhile
            raise BrokenUploadError("another process has this update open")
        yield file
