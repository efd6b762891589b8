"""The gRPC service of protos/coordinator.proto for devices: what is let in."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from coordinator.callers import Callers, common_protocol, storage_errors
from coordinator.cohorts import Cohort, Cohorts
from coordinator.limits import Limits, TooSlowError, Transfers
from coordinator.policy import RefusedUpdateError, Report, TryAgainError
from coordinator.secure_aggregation import AnotherTaskError, RefusedStepError, over
from coordinator.state import State
from coordinator.tables import Device
from coordinator.tls import Authority, RefusedRequestError, requested_key
from coordinator.uploads import BrokenUploadError, Part, Uploads
from edge_runtime import protocol, wire
from edge_runtime.connection import Traffic
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

if TYPE_CHECKING:  # these two names are in the stub only
    from protos.coordinator_pb2_grpc import _MaybeAsyncIterator
    from protos.coordinator_pb2_grpc import _ServicerContext as Context

# Counts of tokens up to here are exact as float64, and fit the database.
MAX_TOKENS = 2**53
# An upload that takes longer is broken off, so that a stalled device does not hold a connection.
UPLOAD_SECONDS = 600.0


class Service(coordinator_pb2_grpc.CoordinatorServicer):
    """Answers devices, each for its cohort. Round logic is in `Rounds`, memory in `State`."""

    def __init__(
        self,
        *,
        state: State,
        cohorts: Cohorts,
        callers: Callers,
        authority: Authority | None,
        masked: bool,
        compressions: tuple[pb.Compression.ValueType, ...],
        traffic: Traffic,
        limits: Limits,
        report: Report,
    ) -> None:
        """
        Args:
            masked: whether updates come by secure aggregation only.
            compressions: that updates may have.
        """
        self._state = state
        self._cohorts = cohorts
        self._callers = callers
        self._authority = authority
        self._masked = masked
        self._compressions = compressions
        self._traffic = traffic
        self._report = report
        uploads = Transfers(limits)
        thread = ThreadPoolExecutor(1, "uploads")
        self._uploads = {
            cohort.name: Uploads(
                cohort=cohort, transfers=uploads, traffic=traffic, masked=masked, thread=thread
            )
            for cohort in cohorts.all
        }
        self._downloads = Transfers(limits)
        # One at a time of a device, so that few cannot take all turns.
        self._downloading: set[str] = set()

    async def CheckIn(self, request: pb.CheckInRequest, context: Context) -> pb.CheckInReply:  # noqa: N802
        self._traffic.receive(request)
        async with self._member(context) as (device, cohort):
            oldest = protocol.SECURE_AGGREGATION if self._masked else None
            spoken = await common_protocol(request.protocol, context, oldest)
            reply = await cohort.rounds.check_in(device.id, request.wait_seconds)
            reply.protocol = spoken
            self._traffic.send(reply)  # counted before what may be the last word of all rounds
            await cohort.rounds.delivered(device.id, request.stored_round)
            return reply

    async def Download(self, request: pb.DownloadRequest, context: Context) -> None:  # type: ignore[override] # noqa: N802
        """Writes the chunks itself: a generator could not be cancelled between two of them."""
        self._traffic.receive(request)
        async with self._member(context) as (device, cohort):
            wanted = cohort.state.round(request.round)
            if wanted is None:
                await context.abort(
                    grpc.StatusCode.NOT_FOUND,
                    f"there is no generalist of round {request.round} yet",
                )
            if device.id in self._downloading:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, "this device is downloading already"
                )
            self._downloading.add(device.id)
            try:
                async with self._downloads.turn() as moved:
                    path, digest = await cohort.generalist(device, wanted)
                    await self._send(path, digest, request.offset, context, moved)
            except TooSlowError as error:
                await context.abort(grpc.StatusCode.ABORTED, str(error))
            except FileNotFoundError:
                gone = wanted.number < cohort.state.current().number
                await context.abort(
                    grpc.StatusCode.NOT_FOUND if gone else grpc.StatusCode.ABORTED,
                    "the generalist of another round took its place",
                )
            finally:
                self._downloading.discard(device.id)

    async def Upload(  # type: ignore[override] # noqa: N802
        self, request_iterator: _MaybeAsyncIterator[Part], context: Context
    ) -> pb.UploadReply:
        """Its parts come as `read_part` makes them."""
        header = pb.UploadHeader()
        async with self._member(context) as (device, cohort):
            parts = aiter(request_iterator)

            async def announced() -> pb.UploadHeader:
                header.CopyFrom(await self._receive_header(parts))
                self._check_header(header, cohort.most_bytes[device.contract_sha256])
                return header

            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    await self._uploads[cohort.name].receive(device, announced, parts)
            except TimeoutError:
                broken = f"the upload took longer than {UPLOAD_SECONDS:.0f} seconds"
            except (BrokenUploadError, TryAgainError) as error:
                broken = str(error)
            except RefusedUpdateError as error:
                await cohort.counting.refuse(device, header.round, error)
                return self._traffic.send(pb.UploadReply(accepted=False, reason=str(error)))
            else:
                return self._traffic.send(pb.UploadReply(accepted=True))
            fields = {"round": header.round, "device": device.name, "reason": broken}
            self._report("upload_broken", {"cohort": cohort.name, **fields})
            await context.abort(grpc.StatusCode.ABORTED, broken)

    async def UploadOffset(  # noqa: N802
        self, request: pb.UploadHeader, context: Context
    ) -> pb.UploadOffsetReply:
        self._traffic.receive(request)
        async with self._member(context) as (device, cohort):
            try:
                self._check_header(request, cohort.most_bytes[device.contract_sha256])
            except RefusedUpdateError:  # `Upload` says why, and the device goes on
                return self._traffic.send(pb.UploadOffsetReply())
            accepted = cohort.state.update(request.round, device.id)
            if accepted is not None and accepted.sha256 == request.sha256:
                offset = request.total_bytes
            else:
                offset = self._uploads[cohort.name].offset(device.id, request)
            return self._traffic.send(pb.UploadOffsetReply(offset=offset))

    async def Aggregate(  # noqa: N802
        self, request: pb.AggregateRequest, context: Context
    ) -> pb.AggregateReply:
        self._traffic.receive(request)
        async with self._member(context) as (device, cohort):
            if not self._masked:  # any more: the device goes on with the rounds as they are
                return self._traffic.send(over("rounds are without secure aggregation"))
            try:
                return self._traffic.send(await cohort.rounds.aggregate(device, request))
            except AnotherTaskError as error:
                await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            except RefusedStepError as error:
                await cohort.counting.refuse(device, request.round, RefusedUpdateError(str(error)))
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def Renew(self, request: pb.SigningRequest, context: Context) -> pb.Certificate:  # noqa: N802
        self._traffic.receive(request)
        async with storage_errors(context, self._report), self._callers.device(context) as device:
            if self._authority is None:
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "without TLS nobody is known well enough to get a certificate",
                )
            try:
                key = requested_key(request.pkcs10, device.name)
            except RefusedRequestError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            assert device.enrolment is not None, "that is how the caller is known"
            issued = self._authority.issue_to_device(key, device.name, device.enrolment)
            self._state.extend(device.enrolment, issued.valid_until)
            return self._traffic.send(pb.Certificate(pem=issued.pem))

    async def _send(
        self,
        path: Path,
        digest: bytes,
        offset: int,
        context: Context,
        moved: Callable[[int], None],
    ) -> None:
        """The file, of that SHA-256, in chunks."""
        with path.open("rb", buffering=0) as file:
            chunk = pb.Chunk(total_bytes=file.seek(0, os.SEEK_END), sha256=digest)
            file.seek(min(offset, chunk.total_bytes))
            data = chunk.data = file.read(wire.CHUNK_BYTES)
            while chunk.total_bytes or data:
                await context.write(self._traffic.send(chunk))
                moved(len(data))
                data = file.read(wire.CHUNK_BYTES)
                chunk = pb.Chunk(data=data)

    @contextlib.asynccontextmanager
    async def _member(self, context: Context) -> AsyncIterator[tuple[Device, Cohort]]:
        """The device that calls, and its cohort."""
        async with storage_errors(context, self._report), self._callers.device(context) as device:
            cohort = self._cohorts.of(device)
            if cohort is None:
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "this coordinator does not serve this device's bundle any more; ask its owner",
                )
            yield device, cohort

    async def _receive_header(self, parts: AsyncIterator[Part]) -> pb.UploadHeader:
        part = await anext(parts, None)
        if part is None:
            raise BrokenUploadError("the upload ended before it began")
        if isinstance(part, memoryview) or part.WhichOneof("part") != "header":
            raise RefusedUpdateError("the upload does not start with a header")
        self._traffic.receive(part)
        return part.header

    def _check_header(self, header: pb.UploadHeader, limit: int) -> None:
        """Raises RefusedUpdateError for what no honest device sends; its bytes have a `limit`."""
        if not 0 < header.total_bytes <= limit:
            raise RefusedUpdateError(
                f"{header.total_bytes} bytes were announced; the shared tensors need more than 0 "
                f"and at most {limit}"
            )
        if len(header.sha256) != hashlib.sha256().digest_size:
            raise RefusedUpdateError("the header holds no SHA-256")
        if header.compression not in (pb.COMPRESSION_NONE, *self._compressions):
            raise RefusedUpdateError("it is compressed in a way that was not offered")
        if header.offset > header.total_bytes:
            raise RefusedUpdateError(
                f"its offset {header.offset} is beyond its {header.total_bytes} bytes"
            )
        if not 0 < header.tokens <= MAX_TOKENS:
            raise RefusedUpdateError(
                f"it says that it was trained on {header.tokens} tokens; that must be between 1 "
                f"and {MAX_TOKENS}"
            )
