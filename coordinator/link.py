"""What passes between the coordinators of one state (protos/link.proto): the one that leads
decides, and those that follow ask it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from coordinator.audit import Auditor
from coordinator.callers import UNKNOWN, Callers, storage_errors
from coordinator.cohorts import Cohort, Cohorts
from coordinator.forwarding import forwarded, is_from_coordinator
from coordinator.policy import Reason, RefusedUpdateError, Report, TryAgainError
from coordinator.state import State
from coordinator.tables import Device
from coordinator.tls import Authority
from edge_runtime.connection import CALL_SECONDS, CHANNEL_OPTIONS
from edge_runtime.identity import new_key, public_key_of
from protos import coordinator_pb2 as pb
from protos import link_pb2, link_pb2_grpc

if TYPE_CHECKING:  # this name is in the stub only
    from protos.link_pb2_grpc import _ServicerContext as Context

# Whatever address a coordinator has, this name is on its certificate (see `tls`).
NAME = "localhost"
NO_LEADER = "the coordinator that leads cannot be reached, or cannot write; try again"
# How long a refusal waits for somebody who leads.
NOTE_SECONDS = 60.0

R = TypeVar("R")


class UndecidedError(Exception):
    """The leader did not decide, and a call ends with that code; the message says why."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Link(link_pb2_grpc.LinkServicer):
    """Answers those who follow."""

    def __init__(
        self,
        *,
        state: State,
        cohorts: Cohorts,
        callers: Callers,
        auditor: Auditor,
        masked: bool,
        compressions: Sequence[pb.Compression.ValueType],
        report: Report,
    ) -> None:
        self._state = state
        self._cohorts = cohorts
        self._callers = callers
        self._auditor = auditor
        self._terms = link_pb2.Terms(
            secure_aggregation=masked, compressions=compressions, cohorts=served(cohorts)
        )
        self._report = report

    async def GetTerms(  # noqa: N802
        self, request: link_pb2.GetTermsRequest, context: Context
    ) -> link_pb2.Terms:
        await _require_coordinator(context)
        return self._terms

    async def CheckUpdate(  # noqa: N802
        self, request: link_pb2.OfferedUpdate, context: Context
    ) -> link_pb2.Verdict:
        device, cohort, header = await self._offered(request, context)

        async def check() -> link_pb2.Verdict:
            new = await cohort.rounds.check_update(device, header)
            return link_pb2.Verdict(counted=not new)

        return await self._verdict(check, context)

    async def CountUpdate(  # noqa: N802
        self, request: link_pb2.OfferedUpdate, context: Context
    ) -> link_pb2.Verdict:
        device, cohort, header = await self._offered(request, context)

        async def count() -> link_pb2.Verdict:
            kept = cohort.state.kept(header.round, device.id, header.sha256)
            if kept is None:  # whoever takes the lead removes what nobody has counted
                raise TryAgainError("the update was lost when another coordinator took the lead")
            await cohort.rounds.accept(device, header, kept)
            return link_pb2.Verdict(counted=True)

        return await self._verdict(count, context)

    async def RefuseUpdate(  # noqa: N802
        self, request: link_pb2.RefusedUpdate, context: Context
    ) -> link_pb2.RefuseUpdateReply:
        device, cohort = await self._member(request.enrolment, context)
        error = RefusedUpdateError(request.refused, Reason(request.kind))
        async with storage_errors(context, self._report):
            await cohort.rounds.refuse(device, request.round, error)
        return link_pb2.RefuseUpdateReply()

    async def NoteRefusal(  # noqa: N802
        self, request: link_pb2.NotedRefusal, context: Context
    ) -> link_pb2.NoteRefusalReply:
        await _require_coordinator(context)
        self._auditor.refused("call_refused", request.by, json.loads(request.fields))
        return link_pb2.NoteRefusalReply()

    async def _offered(
        self, request: link_pb2.OfferedUpdate, context: Context
    ) -> tuple[Device, Cohort, pb.UploadHeader]:
        device, cohort = await self._member(request.enrolment, context)
        try:
            return device, cohort, pb.UploadHeader.FromString(request.header)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "there is no header")

    async def _member(self, enrolment: str, context: Context) -> tuple[Device, Cohort]:
        await _require_coordinator(context)
        async with storage_errors(context, self._report):
            device = self._state.enrolled(enrolment)
        cohort = None if device is None else self._cohorts.of(device)
        if device is None or cohort is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)
        self._callers.heard(device)
        return device, cohort

    async def _verdict(
        self, decide: Callable[[], Awaitable[link_pb2.Verdict]], context: Context
    ) -> link_pb2.Verdict:
        try:
            async with storage_errors(context, self._report):
                return await decide()
        except RefusedUpdateError as error:
            return link_pb2.Verdict(refused=str(error), kind=error.reason)
        except TryAgainError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))


async def _require_coordinator(context: Context) -> None:
    if not is_from_coordinator(context):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this is between coordinators")


def served(cohorts: Cohorts) -> list[link_pb2.ServedCohort]:
    return [
        link_pb2.ServedCohort(name=cohort.name, contracts_sha256=sorted(cohort.manifests))
        for cohort in sorted(cohorts.all, key=lambda cohort: cohort.name)
    ]


class Leader:
    """The coordinator that leads, for one that follows. One event loop."""

    def __init__(self, address: str, authority: Authority) -> None:
        key = new_key()
        issued = authority.for_links().issue_to_coordinator(public_key_of(key))
        self._channel = grpc.aio.secure_channel(
            address,
            grpc.ssl_channel_credentials(authority.pem, key.encode(), issued.pem.encode()),
            [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", NAME)],
        )
        self._stub = link_pb2_grpc.LinkStub(self._channel)
        self._notes: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        await self._channel.close(None)

    async def terms(self) -> link_pb2.Terms:
        """Raises UndecidedError, as everything below."""
        return await self._asked(
            self._stub.GetTerms(link_pb2.GetTermsRequest(), timeout=CALL_SECONDS)
        )

    async def check_update(self, device: Device, header: pb.UploadHeader) -> bool:
        """As `Rounds.check_update`; the next two likewise."""
        call = self._stub.CheckUpdate(_offered(device, header), timeout=CALL_SECONDS)
        return not (await self._decided(call)).counted

    async def accept(self, device: Device, header: pb.UploadHeader, file: str) -> None:
        await self._decided(self._stub.CountUpdate(_offered(device, header), timeout=CALL_SECONDS))

    async def refuse(self, device: Device, number: int, error: RefusedUpdateError) -> None:
        request = link_pb2.RefusedUpdate(
            enrolment=device.enrolment or "",
            round=number,
            refused=str(error),
            kind=error.reason,
        )
        await self._asked(self._stub.RefuseUpdate(request, timeout=CALL_SECONDS))

    async def _decided(self, call: Awaitable[link_pb2.Verdict]) -> link_pb2.Verdict:
        verdict = await self._asked(call)
        if verdict.refused:
            raise RefusedUpdateError(verdict.refused, Reason(verdict.kind))
        return verdict

    async def _asked(self, call: Awaitable[R]) -> R:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.ABORTED:
                raise TryAgainError(error.details() or "") from error
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:  # revoked meanwhile
                raise UndecidedError(error.code(), error.details() or "") from error
            raise UndecidedError(grpc.StatusCode.UNAVAILABLE, NO_LEADER) from error

    # What is passed on as it is

    def passing(
        self, service: ServiceDescriptor
    ) -> dict[str, Callable[[Any, Any], Awaitable[Any]]]:
        """Name of each unary method of `service` -> what has it answered by the leader."""
        return {
            method.name: self._passing(method)
            for method in service.methods
            if not method.client_streaming and not method.server_streaming
        }

    def _passing(self, method: MethodDescriptor) -> Callable[[Any, Any], Awaitable[Any]]:
        call = self._channel.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )

        async def answer(request: Message, context: Any) -> Any:
            try:
                return await call(
                    request, metadata=forwarded(context), timeout=context.time_remaining()
                )
            except grpc.aio.AioRpcError as error:
                gone = error.code() == grpc.StatusCode.UNAVAILABLE
                await context.abort(error.code(), NO_LEADER if gone else error.details())

        return answer

    def handler(self, service: ServiceDescriptor) -> grpc.GenericRpcHandler[Any, Any]:
        """Has all of `service` answered by the leader."""
        passing = self.passing(service)
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                passing[method.name],
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for method in service.methods
        }
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    # For `Calls`, in the place of an Auditor

    def record(self, event: str, by: str, fields: dict[str, Any]) -> Future[None]:
        """The leader does it: it carries out what is passed on."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def refused(self, event: str, by: str, fields: dict[str, Any]) -> None:
        """Has the leader note a call that was refused here; others it has refused itself."""
        if fields["call"] in ("Download", "Upload", "UploadOffset"):
            note = link_pb2.NotedRefusal(by=by, fields=json.dumps(fields))
            call = self._stub.NoteRefusal(note, timeout=NOTE_SECONDS, wait_for_ready=True)
            task = asyncio.create_task(_waited(call))
            self._notes.add(task)
            task.add_done_callback(self._notes.discard)


async def _waited(call: Awaitable[Any]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):  # nobody leads
        await call


def _offered(device: Device, header: pb.UploadHeader) -> link_pb2.OfferedUpdate:
    return link_pb2.OfferedUpdate(
        enrolment=device.enrolment or "", header=header.SerializeToString()
    )
