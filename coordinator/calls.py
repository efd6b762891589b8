"""What goes over every call of every service: who made it, how it ended, how long it took.

An interceptor, so that no service has to think of it: a call that is added tomorrow is counted, an
administrator's act is in the audit log before it is carried out, and a refusal after it was made.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from coordinator.audit import NOBODY
from coordinator.forwarding import address_of, caller_of
from coordinator.tls import Role, subject_of
from coordinator.uploads import read_part
from edge_runtime import protocol
from edge_runtime.errors import StorageError
from protos import coordinator_pb2

ADMIN = coordinator_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
# Calls of administrators that change nothing are called so.
READING = ("List", "Get")
REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,  # a version that is not spoken here
}


@dataclass(frozen=True)
class Call:
    """A call that has ended."""

    service: str
    """Full name, such as "comigs.v1.Coordinator"."""
    method: str
    code: grpc.StatusCode
    details: str
    by: str
    """Id in the caller's certificate, or NOBODY."""
    address: str
    """Where it came from."""
    started: float
    """Seconds since the epoch."""
    seconds: float


class Auditing(Protocol):
    """An Auditor, or what stands for one."""

    def record(self, event: str, by: str, fields: dict[str, Any]) -> Future[None]: ...

    def refused(self, event: str, by: str, fields: dict[str, Any]) -> None: ...


class Calls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Sees all calls of the servers that it is given to."""

    def __init__(self, auditor: Auditing) -> None:
        self._auditor = auditor
        self.administrator: str | None = None
        """The id in the one administrator's certificate; None: nobody is, at this coordinator."""
        self.observers: list[Callable[[Call], None]] = []
        """Are told of every call when it has ended."""
        self.open: Counter[tuple[str, str]] = Counter()
        """(service, method) -> calls that are open now."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler  # there is no such method
        _, service, method = handler_call_details.method.split("/")
        return self._watched(handler, service, method)

    def _watched(self, handler: Any, service: str, method: str) -> Any:
        """`handler`, with its behaviour wrapped."""
        behaviour, wrap = next(
            (getattr(handler, kind), getattr(grpc, f"{kind}_rpc_method_handler"))
            for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
            if getattr(handler, kind)
        )

        async def answer(request: Any, context: Any) -> Any:
            async with self._watch(service, method, request, context):
                return await behaviour(await _good(request, context), context)

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self._watch(service, method, request, context):
                async for message in behaviour(await _good(request, context), context):
                    yield message

        watched = generate if inspect.isasyncgenfunction(behaviour) else answer
        read = _reading(handler.request_deserializer)
        return wrap(watched, read, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _watch(
        self, service: str, method: str, request: Any, context: Any
    ) -> AsyncIterator[None]:
        """Around one call's behaviour."""
        pem = caller_of(context)
        subject = None if pem is None else subject_of(pem)
        by = NOBODY if subject is None else subject.id
        address = address_of(context)
        is_act = (
            service == ADMIN
            and not method.startswith(READING)
            and subject is not None
            and subject.role == Role.ADMINISTRATOR
            # One that was replaced is refused, and what is refused is limited in the log.
            and subject.id == self.administrator
        )
        started, begun = time.time(), time.monotonic()
        error: BaseException | None = None
        self.open[service, method] += 1
        try:
            if is_act and isinstance(request, Message):
                await self._record_act(method, request, context, by, address)
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.open[service, method] -= 1
            call = Call(
                service=service,
                method=method,
                code=_code(context.code(), error),
                details=context.details() or "",
                by=by,
                address=address,
                started=started,
                seconds=time.monotonic() - begun,
            )
            self._note_refusal(call, is_act)
            for observer in self.observers:
                observer(call)

    async def _record_act(
        self, method: str, request: Any, context: Any, by: str, address: str
    ) -> None:
        what = json_format.MessageToDict(request, preserving_proto_field_name=True)
        fields = {"act": method, "request": what, "address": address}
        try:
            await asyncio.wrap_future(self._auditor.record("act", by, fields))
        except StorageError:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                "the coordinator cannot write its audit log, so nothing was done",
            )

    def _note_refusal(self, call: Call, is_act: bool) -> None:
        fields = {"call": call.method, "code": call.code.name, "reason": call.details}
        fields["address"] = call.address
        if is_act and call.code != grpc.StatusCode.OK:
            self._auditor.refused("act_failed", call.by, fields)
        elif call.code in REFUSALS:
            self._auditor.refused("call_refused", call.by, fields)


@dataclass(frozen=True)
class _Bad:
    """Stands for bytes that are no message as it should be. Raising an error where they are read
    would write a traceback into the log, which anybody could cause."""

    code: grpc.StatusCode
    reason: str


def _reading(deserialize: Any) -> Callable[[bytes], Any]:
    """`deserialize`, for a kind of message, within its limit."""
    kind = deserialize.__self__.DESCRIPTOR.name
    read = read_part if kind == "UploadPart" else deserialize

    def checked(content: bytes) -> Any:
        try:
            protocol.check_size(kind, len(content))
            return read(content)
        except protocol.TooLargeError as error:
            return _Bad(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except DecodeError:
            return _Bad(grpc.StatusCode.INVALID_ARGUMENT, "the message cannot be read")

    return checked


async def _good(request: Any, context: Any) -> Any:
    """`request`, a message or a stream of them; ends the call if one is bad."""
    if isinstance(request, _Bad):
        await context.abort(request.code, request.reason)
    return request if isinstance(request, Message) else _each_good(request, context)


async def _each_good(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, _Bad):
            await context.abort(request.code, request.reason)
        yield request


def _code(said: Any, error: BaseException | None) -> grpc.StatusCode:
    """With what a call ended: as it was said, or as gRPC will say."""
    for code in grpc.StatusCode:
        if said and said in (code, code.value[0]):
            return code
    if error is None:
        return grpc.StatusCode.OK
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.UNKNOWN
