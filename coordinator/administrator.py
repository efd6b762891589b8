"""The administrator's side of protos/coordinator.proto."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from edge_runtime.connection import CALL_SECONDS, Closing, Patience, connect
from edge_runtime.identity import Identity
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

PATIENCE = Patience(5.0, on_wait=lambda _: None)


class Administrator(Closing):
    """A connection to one coordinator; calls retry and raise as `Connection` does."""

    def __init__(self, identity: Identity, patience: Patience = PATIENCE) -> None:
        self._connection = connect(identity, patience)
        self._stub = coordinator_pb2_grpc.AdminStub(self._connection.channel)

    def close(self) -> None:
        self._connection.close()

    def invite(self, name: str, valid_seconds: float, cohort: str = "") -> pb.InviteReply:
        """An invitation for a device of that name, which works for `valid_seconds`.

        Without `cohort` the device's bundle says where it belongs.
        """
        request = pb.InviteRequest(name=name, valid_seconds=valid_seconds, cohort=cohort)
        return self._connection.retry(lambda: self._stub.Invite(request, timeout=CALL_SECONDS))

    def revoke(self, name: str) -> None:
        """Refuses the device of that name from now on."""
        request = pb.RevokeRequest(name=name)
        self._connection.retry(lambda: self._stub.Revoke(request, timeout=CALL_SECONDS))

    def devices(self) -> Sequence[pb.DeviceEntry]:
        """All devices that ever enrolled."""
        request = pb.ListDevicesRequest()
        return self._connection.retry(
            lambda: self._stub.ListDevices(request, timeout=CALL_SECONDS)
        ).devices

    # The following are about one cohort, which need not be named if there is but one.

    def pause(self, cohort: str = "") -> None:
        """No round begins or ends from now on."""
        request = pb.PauseRequest(cohort=cohort)
        self._connection.retry(lambda: self._stub.Pause(request, timeout=CALL_SECONDS))

    def resume(self, cohort: str = "") -> None:
        """Ends a pause."""
        request = pb.ResumeRequest(cohort=cohort)
        self._connection.retry(lambda: self._stub.Resume(request, timeout=CALL_SECONDS))

    def abort(self, reason: str = "", cohort: str = "") -> int:
        """Abandons the open round, once however often it is tried; its number."""
        request = pb.AbortRequest(reason=reason, command=secrets.token_hex(16), cohort=cohort)
        return self._connection.retry(lambda: self._stub.Abort(request, timeout=CALL_SECONDS)).round

    def roll_back(self, number: int, cohort: str = "") -> int:
        """Goes back to what round `number` started from, once however often it is tried.

        Returns:
            The round that starts from it.
        """
        request = pb.RollBackRequest(round=number, command=secrets.token_hex(16), cohort=cohort)
        return self._connection.retry(
            lambda: self._stub.RollBack(request, timeout=CALL_SECONDS)
        ).round
