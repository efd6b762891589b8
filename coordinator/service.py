"""The gRPC service of protos/coordinator.proto for devices: what is let in."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import grpc

from coordinator.callers import Callers, common_protocol, storage_errors
from coordinator.limits import Limits, TooSlowError, Transfers
from coordinator.rounds import RefusedUpdateError, Report, Rounds
from coordinator.secure_aggregation import RefusedStepError
from coordinator.state import Round, State
from coordinator.tls import Authority, RefusedRequestError, requested_key
from coordinator.uploads import BrokenUploadError, Uploads
from edge_runtime import protocol, wire
from edge_runtime.connection import Traffic
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, manifest_pb2

if TYPE_CHECKING:  # these two names are in the stub only
    from protos.coordinator_pb2_grpc import _MaybeAsyncIterator
    from protos.coordinator_pb2_grpc import _ServicerContext as Context

# Counts of tokens up to here are exact as float64, and fit the database.
MAX_TOKENS = 2**53
# An upload that takes longer is broken off, so that a stalled device does not hold a connection.
UPLOAD_SECONDS = 600.0


class Service(coordinator_pb2_grpc.CoordinatorServicer):
    """Answers devices. Round logic is in `Rounds`, memory in `State`."""

    def __init__(
        self,
        *,
        state: State,
        rounds: Rounds,
        callers: Callers,
        authority: Authority | None,
        manifest: manifest_pb2.Manifest,
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
        self._rounds = rounds
        self._callers = callers
        self._authority = authority
        self._manifest = manifest
        self._masked = masked
        self._compressions = compressions
        self._traffic = traffic
        self._report = report
        self._uploads = Uploads(
            state=state, manifest=manifest, limits=limits, traffic=traffic, masked=masked
        )
        self._downloads = Transfers(limits)

    async def CheckIn(self, request: pb.CheckInRequest, context: Context) -> pb.CheckInReply:  # noqa: N802
        self._traffic.receive(request)
        async with storage_errors(context, self._report), self._callers.device(context) as device:
            oldest = protocol.SECURE_AGGREGATION if self._masked else None
            spoken = await common_protocol(request.protocol, context, oldest)
            reply = await self._rounds.check_in(device.id, request.wait_seconds)
            reply.protocol = spoken
            self._rounds.delivered(device.id, request.stored_round)
            return self._traffic.send(reply)

    async def Download(self, request: pb.DownloadRequest, context: Context) -> None:  # type: ignore[override] # noqa: N802
        """Writes the chunks itself: a generator could not be cancelled between two of them."""
        self._traffic.receive(request)
        async with storage_errors(context, self._report), self._callers.device(context):
            wanted = self._state.round(request.round)
            if wanted is None:
                await context.abort(
                    grpc.StatusCode.NOT_FOUND,
                    f"there is no generalist of round {request.round} yet",
                )
            try:
                async with self._downloads.turn() as moved:
                    await self._send(wanted, request.offset, context, moved)
            except TooSlowError as error:
                await context.abort(grpc.StatusCode.ABORTED, str(error))

    async def Upload(  # noqa: N802
        self, request_iterator: _MaybeAsyncIterator[pb.UploadPart], context: Context
    ) -> pb.UploadReply:
        header = pb.UploadHeader()
        async with storage_errors(context, self._report), self._callers.device(context) as device:
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    parts = aiter(request_iterator)
                    header = await self._receive_header(parts)
                    self._check_header(header)
                    if self._rounds.check_update(device.id, header):
                        file = await self._uploads.receive(device.id, header, parts)
                        self._rounds.accept(device, header, file)
            except TimeoutError:
                broken = f"the upload took longer than {UPLOAD_SECONDS:.0f} seconds"
            except BrokenUploadError as error:
                broken = str(error)
            except RefusedUpdateError as error:
                self._rounds.refuse(device, header.round, error)
                return self._traffic.send(pb.UploadReply(accepted=False, reason=str(error)))
            else:
                return self._traffic.send(pb.UploadReply(accepted=True))
            fields = {"round": header.round, "device": device.name, "reason": broken}
            self._report("upload_broken", fields)
            await context.abort(grpc.StatusCode.ABORTED, broken)

    async def UploadOffset(  # noqa: N802
        self, request: pb.UploadHeader, context: Context
    ) -> pb.UploadOffsetReply:
        self._traffic.receive(request)
        async with storage_errors(context, self._report), self._callers.device(context) as device:
            try:
                self._check_header(request)
            except RefusedUpdateError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            accepted = self._state.update(request.round, device.id)
            if accepted is not None and accepted.sha256 == request.sha256:
                offset = request.total_bytes
            else:
                offset = self._uploads.offset(device.id, request)
            return self._traffic.send(pb.UploadOffsetReply(offset=offset))

    async def Aggregate(  # noqa: N802
        self, request: pb.AggregateRequest, context: Context
    ) -> pb.AggregateReply:
        self._traffic.receive(request)
        async with storage_errors(context, self._report), self._callers.device(context) as device:
            if not self._masked:
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, "rounds are without secure aggregation"
                )
            try:
                return self._traffic.send(await self._rounds.aggregate(device, request))
            except RefusedStepError as error:
                self._rounds.refuse(device, request.round, RefusedUpdateError(str(error)))
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
        self, wanted: Round, offset: int, context: Context, moved: Callable[[int], None]
    ) -> None:
        """The generalist that round `wanted` starts from, in chunks."""
        with (self._state.directory / wanted.generalist_file).open("rb", buffering=0) as file:
            chunk = pb.Chunk(
                total_bytes=file.seek(0, os.SEEK_END),
                sha256=bytes.fromhex(wanted.generalist_sha256),
            )
            file.seek(min(offset, chunk.total_bytes))
            data = chunk.data = file.read(wire.CHUNK_BYTES)
            while chunk.total_bytes or data:
                await context.write(self._traffic.send(chunk))
                moved(len(data))
                data = file.read(wire.CHUNK_BYTES)
                chunk = pb.Chunk(data=data)

    async def _receive_header(self, parts: AsyncIterator[pb.UploadPart]) -> pb.UploadHeader:
        part = await anext(parts, None)
        if part is None:
            raise BrokenUploadError("the upload ended before it began")
        self._traffic.receive(part)
        if part.WhichOneof("part") != "header":
            raise RefusedUpdateError("the upload does not start with a header")
        return part.header

    def _check_header(self, header: pb.UploadHeader) -> None:
        limit = wire.max_bytes(self._manifest)
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
