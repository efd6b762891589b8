"""The administrator's side of protos/coordinator.proto."""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.connection import CALL_SECONDS, Closing, Patience, connect
from edge_runtime.identity import Identity
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

RETRY_SECONDS = 5.0


class Administrator(Closing):
    """A connection to one coordinator; calls retry and raise as `Connection` does."""

    def __init__(self, identity: Identity) -> None:
        self._connection = connect(identity, Patience(RETRY_SECONDS, on_wait=lambda _: None))
        self._stub = coordinator_pb2_grpc.AdminStub(self._connection.channel)

    def close(self) -> None:
        self._connection.close()

    def invite(self, name: str, valid_seconds: float) -> pb.InviteReply:
        """An invitation for a device of that name, which works for `valid_seconds`."""
        request = pb.InviteRequest(name=name, valid_seconds=valid_seconds)
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
