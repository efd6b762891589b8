"""The ports that a coordinator listens on."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.calls import Calls
from coordinator.limits import Limits, raise_file_limit, watch_connections
from coordinator.options import Options
from coordinator.policy import Report
from coordinator.tls import Authority
from edge_runtime.errors import AddressError
from protos import coordinator_pb2

WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - recognised, not listened on
# How long calls that are being answered may take to end when the coordinator stops.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Ports:
    """What listens with TLS: for those who have a certificate, and for those who want one.

    They need a port each: gRPC for Python either requires a client's certificate or takes none.
    """

    main: grpc.aio.Server
    enrolment: grpc.aio.Server
    host: str
    port: int
    enrolment_port: int

    @classmethod
    def open(cls, options: Options, authority: Authority, calls: Calls) -> Ports:
        """
        Raises:
            AddressError: the address cannot be listened on.
        """
        host, port = split(options.listen)
        if port == 65535 and options.enrolment_port is None:  # gRPC takes 65536 for any port
            raise AddressError(
                f"--listen {options.listen} has the last port, and invitations are used at the "
                "next one; give --enrolment-port, or choose another --listen"
            )
        made = authority.server_credentials([bare(host), *options.names])
        pairs = [(made.private_key, made.certificate_chain)]
        # Coordinators of one state may share a port; the kernel deals the connections out.
        shared = options.database is not None
        main, enrolment = (server(options.limits, calls, shared=shared) for _ in range(2))
        mutual = grpc.ssl_server_credentials(pairs, authority.pem, require_client_auth=True)
        bound = bind(main, host, port, "--listen", mutual)
        wanted = options.enrolment_port
        if wanted is None:
            wanted = port and port + 1
        elif wanted == bound:  # a shared port would be bound twice, and calls go to either
            raise AddressError(
                f"--enrolment-port {wanted} is the port of --listen, and the two need a port each; "
                "choose another --enrolment-port, or leave it out"
            )
        plain = grpc.ssl_server_credentials(pairs)
        bound_enrolment = bind(enrolment, host, wanted, "--enrolment-port", plain)
        return cls(main, enrolment, host, bound, bound_enrolment)

    @property
    def addresses(self) -> dict[str, str]:
        """Fields of an event."""
        return {
            "address": f"{self.host}:{self.port}",
            "enrolment": f"{self.host}:{self.enrolment_port}",
        }

    async def start(
        self, stack: contextlib.AsyncExitStack, *, grace: float = GRACE_SECONDS
    ) -> None:
        """Listens until `stack` unwinds; calls then have `grace` seconds to end."""
        await start(self.main, ["Coordinator", "Admin"], stack, grace=grace)
        await start(self.enrolment, ["Enrolment"], stack, grace=grace)


def server(limits: Limits, calls: Calls, *, shared: bool = False) -> grpc.aio.Server:
    limits = replace(limits, connections=raise_file_limit(limits.connections))
    return grpc.aio.server(options=limits.channel_options(shared=shared), interceptors=[calls])


def bind(
    server: grpc.aio.Server,
    host: str,
    port: int,
    option: str,
    credentials: grpc.ServerCredentials | None,
) -> int:
    """The port that `server` will listen on; `option` is where it comes from."""
    address = f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise AddressError(
            f"cannot listen on {address}: the port is in use or the address is not this "
            f"machine's; stop what uses it, or choose another {option} (port 0 takes a free one)"
        ) from error


async def start(
    server: grpc.aio.Server,
    services: list[str],
    stack: contextlib.AsyncExitStack,
    *,
    grace: float = GRACE_SECONDS,
) -> None:
    """Starts `server` with the standard services; it lets calls end when `stack` unwinds."""
    described = coordinator_pb2.DESCRIPTOR.services_by_name
    names = [described[service].full_name for service in services]
    checks = _Health()
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    await server.start()
    stack.push_async_callback(server.stop, grace)


class _Health(health.aio.HealthServicer):  # type: ignore[misc, name-defined]
    """Standard health checks, but that none is held open: that needs no certificate at the
    enrolment port, and kept its connection from ever being idle."""

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        """As the protocol has it for servers that only answer."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "only Check is answered here")


def watch(stack: contextlib.AsyncExitStack, report: Report, limits: Limits, *ports: int) -> None:
    """Holds the connections to `ports` to their limit per address until `stack` unwinds."""

    def closed(address: str, count: int) -> None:
        report("connections_closed", {"address": address, "connections": count})

    watching = watch_connections(ports, limits.connections_per_address, closed)
    stack.callback(asyncio.create_task(watching).cancel)


def reached(host: str, names: Sequence[str]) -> str:
    """The host name or address by which devices come; empty if it is not known here."""
    name = names[0] if names else bare(host)
    if name in WILDCARDS:
        return ""
    return f"[{name}]" if ":" in name else name


def is_host(name: str) -> bool:
    """Whether it is an IP address, or a host name as a certificate holds it."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", name) is not None
    return True


def bare(host: str) -> str:
    """Without the brackets that an IPv6 address has in HOST:PORT."""
    return host.strip("[]")


def split(listen: str) -> tuple[str, int]:
    """
    Raises:
        AddressError: `listen` is not HOST:PORT.
    """
    host, _, port = listen.rpartition(":")
    if not is_host(bare(host)) or not port.isdecimal() or int(port) > 65535:
        raise AddressError(
            f"{listen} is not an address to listen on; give HOST:PORT, for example 127.0.0.1:50051"
        )
    return host, int(port)
