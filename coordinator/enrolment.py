"""The gRPC service of protos/coordinator.proto that turns an invitation into a certificate."""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import TYPE_CHECKING

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from coordinator.callers import NO_BUNDLE, Callers, common_protocol, storage_errors
from coordinator.cohorts import Cohorts
from coordinator.policy import Report
from coordinator.state import State
from coordinator.tables import Invitation
from coordinator.tls import Authority, RefusedRequestError, requested_key
from edge_runtime.connection import Traffic
from edge_runtime.invitation import is_name
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

if TYPE_CHECKING:  # this name is in the stub only
    from protos.coordinator_pb2_grpc import _ServicerContext as Context


class Enrolment(coordinator_pb2_grpc.EnrolmentServicer):
    """Answers whoever has an invitation; nobody else gets a certificate."""

    def __init__(
        self,
        *,
        state: State,
        callers: Callers,
        authority: Authority,
        cohorts: Cohorts,
        traffic: Traffic,
        report: Report,
    ) -> None:
        self._state = state
        self._callers = callers
        self._authority = authority
        self._cohorts = cohorts
        self._traffic = traffic
        self._report = report

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.Certificate:  # noqa: N802
        self._traffic.receive(request)
        async with storage_errors(context, self._report):
            await common_protocol(request.protocol, context)
            invitation = await self._invitation(request.token, context)
            try:
                key = requested_key(request.request.pkcs10, invitation.name)
            except RefusedRequestError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            cohort = self._cohorts.place(request.contract_sha256, invitation.cohort)
            if cohort is None:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NO_BUNDLE)
            key_sha256 = hashlib.sha256(
                key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            ).digest()
            if invitation.key_sha256 not in (None, key_sha256):
                await context.abort(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "this invitation was already used by another device; ask for a new one",
                )
            enrolment = invitation.enrolment or secrets.token_hex(16)
            issued = self._authority.issue_to_device(key, invitation.name, enrolment)
            if invitation.enrolment is None:
                device = self._state.enrol(
                    invitation.name,
                    cohort=cohort.name,
                    contract_sha256=request.contract_sha256,
                    enrolment=enrolment,
                    key_sha256=key_sha256,
                    valid_until=issued.valid_until,
                    tier=request.tier if is_name(request.tier) else None,
                )
                self._callers.shut_out(device.id)  # who had the name before
                fields = {"device": device.name, "certificate": enrolment}
                self._report("device_enrolled", {"cohort": cohort.name, **fields})
            else:
                self._state.extend(enrolment, issued.valid_until)
            return self._traffic.send(pb.Certificate(pem=issued.pem))

    async def _invitation(self, token: bytes, context: Context) -> Invitation:
        invitation = self._state.invitation(token)
        if invitation is None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "this invitation is not from here, or was replaced or revoked; ask for a new one",
            )
        if time.time() > invitation.expires_at:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "this invitation has expired; ask for a new one"
            )
        return invitation
