"""The gRPC service of protos/coordinator.proto: who may call, and what is let in."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import Message

from coordinator.rounds import RefusedUpdateError, Report, Rounds
from coordinator.state import Device, State
from edge_runtime import wire
from edge_runtime.bundle import contract_sha256
from edge_runtime.errors import AdapterError, StorageError
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, manifest_pb2

if TYPE_CHECKING:  # these two names are in the stub only
    from protos.coordinator_pb2_grpc import _MaybeAsyncIterator
    from protos.coordinator_pb2_grpc import _ServicerContext as Context

# Counts of tokens up to here are exact as float64, and fit the database.
MAX_TOKENS = 2**53
# An upload that takes longer is given up, so that a stalled device does not hold memory.
UPLOAD_SECONDS = 600.0

M = TypeVar("M", bound=Message)


class Service(coordinator_pb2_grpc.CoordinatorServicer):
    """Answers devices. Round logic is in `Rounds`, memory in `State`."""

    def __init__(
        self, *, state: State, rounds: Rounds, manifest: manifest_pb2.Manifest, report: Report
    ) -> None:
        self._state = state
        self._rounds = rounds
        self._manifest = manifest
        self._report = report
        self._contract = contract_sha256(manifest)
        self.bytes_received = 0
        """Serialized messages of this service since the start; `bytes_sent` likewise."""
        self.bytes_sent = 0

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollReply:  # noqa: N802
        self._received(request)
        if not (1 <= len(request.name) <= 64 and request.name.isprintable()):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "a device's name has 1 to 64 printable characters"
            )
        if not 16 <= len(request.key) <= 64:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "an enrolment key has 16 to 64 bytes"
            )
        if request.contract_sha256 != self._contract:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                "this device's bundle has another base or other shared tensors than the "
                "coordinator's; export both from the same base with the same rank and targets",
            )
        token = secrets.token_urlsafe(32)
        async with self._storage_errors(context):
            device = self._state.enroll(
                secrets.token_hex(16), request.name, key=request.key, token=token.encode()
            )
        if device is None:
            await context.abort(
                grpc.StatusCode.ALREADY_EXISTS,
                f"another device is called {request.name}; choose another name",
            )
        return self._sent(pb.EnrollReply(device_id=device, token=token))

    async def CheckIn(self, request: pb.CheckInRequest, context: Context) -> pb.CheckInReply:  # noqa: N802
        self._received(request)
        async with self._storage_errors(context):
            device = await self._authenticated(context)
            reply = self._sent(await self._rounds.check_in(device.id, request.wait_seconds))
            self._rounds.delivered(device.id, request.stored_round)
            return reply

    async def Download(  # noqa: N802
        self, request: pb.DownloadRequest, context: Context
    ) -> AsyncIterator[pb.Chunk]:
        self._received(request)
        await self._authenticated(context)
        wanted = self._state.round(request.round)
        if wanted is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"there is no generalist of round {request.round} yet"
            )
        file = self._state.directory / wanted.generalist_file
        payload = await asyncio.to_thread(file.read_bytes)
        chunk = pb.Chunk(total_bytes=len(payload), sha256=bytes.fromhex(wanted.generalist_sha256))
        for data in wire.chunks(payload):
            chunk.data = data
            yield self._sent(chunk)
            chunk = pb.Chunk()

    async def Upload(  # noqa: N802
        self, request_iterator: _MaybeAsyncIterator[pb.UploadPart], context: Context
    ) -> pb.UploadReply:
        device = await self._authenticated(context)
        header = pb.UploadHeader()
        async with self._storage_errors(context):
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    parts = aiter(request_iterator)
                    header = await self._receive_header(parts)
                    self._check_header(header)
                    if self._rounds.check_update(device.id, header) is None:
                        payload = await self._receive_payload(parts, header)
                        file = await asyncio.to_thread(self._store, device.id, header, payload)
                        self._rounds.accept(device, header, file)
            except TimeoutError:
                reason = f"the upload took longer than {UPLOAD_SECONDS:.0f} seconds"
            except RefusedUpdateError as error:
                reason = str(error)
            else:
                return self._sent(pb.UploadReply(accepted=True))
            self._rounds.refuse(device, header.round, reason)
        return self._sent(pb.UploadReply(accepted=False, reason=reason))

    async def _receive_header(self, parts: AsyncIterator[pb.UploadPart]) -> pb.UploadHeader:
        part = await anext(parts, pb.UploadPart())
        self._received(part)
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
        if not 0 < header.tokens <= MAX_TOKENS:
            raise RefusedUpdateError(
                f"it says that it was trained on {header.tokens} tokens; that must be between 1 "
                f"and {MAX_TOKENS}"
            )

    async def _receive_payload(
        self, parts: AsyncIterator[pb.UploadPart], header: pb.UploadHeader
    ) -> bytes:
        """The announced bytes. Never holds more than that."""
        payload = bytearray()
        async for part in parts:
            self._received(part)
            if part.WhichOneof("part") != "data":
                raise RefusedUpdateError("something other than data follows the header")
            if len(payload) + len(part.data) > header.total_bytes:
                raise RefusedUpdateError(
                    f"more data came than the {header.total_bytes} bytes that were announced"
                )
            payload += part.data
        if len(payload) < header.total_bytes:
            raise RefusedUpdateError(
                f"the upload is truncated: {len(payload)} of {header.total_bytes} bytes came"
            )
        return bytes(payload)

    def _store(self, device: str, header: pb.UploadHeader, payload: bytes) -> str:
        """Checks a payload and puts it on disk, where nothing counts it yet."""
        if hashlib.sha256(payload).digest() != header.sha256:
            raise RefusedUpdateError("the data does not match the announced SHA-256")
        try:
            wire.decode(self._manifest, payload)
        except AdapterError as error:
            raise RefusedUpdateError(str(error)) from error
        return self._state.write_payload(header.round, device, payload)

    async def _authenticated(self, context: Context) -> Device:
        metadata = dict(context.invocation_metadata() or ())
        device = self._state.device(str(metadata.get("comigs-device", "")))
        token = str(metadata.get("authorization", "")).removeprefix("Bearer ")
        given = hashlib.sha256(token.encode()).digest()
        if device is None or not hmac.compare_digest(given, device.token_sha256):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "this coordinator does not know the device or its token; enrol it again",
            )
        return device

    @contextlib.asynccontextmanager
    async def _storage_errors(self, context: Context) -> AsyncIterator[None]:
        """A full disk is the operator's to mend; devices may try again meanwhile."""
        try:
            yield
        except StorageError as error:
            self._report("storage_failed", {"reason": str(error)})
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "the coordinator cannot write to its disk"
            )

    def _received(self, message: Message) -> None:
        self.bytes_received += message.ByteSize()

    def _sent(self, message: M) -> M:
        self.bytes_sent += message.ByteSize()
        return message
