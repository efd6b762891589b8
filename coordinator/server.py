"""Puts the coordinator together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.rounds import Policy, Report, Rounds
from coordinator.service import Service
from coordinator.state import Settings, State
from coordinator.tls import CA_FILE, server_credentials
from edge_runtime import adapters, wire
from edge_runtime.bundle import contract_sha256, open_bundle
from edge_runtime.errors import AddressError
from protos import coordinator_pb2, coordinator_pb2_grpc

SERVICE_NAME = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name
# How long calls that are being answered may take to end when the coordinator stops.
GRACE_SECONDS = 5.0
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    # A chunk and its envelope; anything larger is an attack or a mistake.
    ("grpc.max_receive_message_length", 2 * wire.CHUNK_BYTES),
    ("grpc.max_send_message_length", 2 * wire.CHUNK_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
    # Two coordinators on one port would each get half of the devices.
    ("grpc.so_reuseport", 0),
    # Devices vanish without a word: notice within about 30 seconds.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


@dataclass(frozen=True)
class Options:
    """What `comigs serve` was asked for."""

    bundle: Path
    listen: str
    """HOST:PORT; port 0 takes a free one."""
    state: Path
    policy: Policy
    names: tuple[str, ...]
    """Further host names and IP addresses for the certificate."""
    insecure: bool
    exit_when_done: bool


async def serve(options: Options, report: Report) -> None:
    """Runs rounds until SIGTERM or SIGINT or, with `exit_when_done`, the end of the last one.

    Raises:
        BundleError: no usable bundle, or the state belongs to another one.
        AddressError: the address is malformed or cannot be listened on.
        StorageError: the state directory is in use or cannot be written.
        TrustError: the certificate authority in the state directory is damaged.
    """
    bundle = open_bundle(options.bundle)
    host, port = _split(options.listen)
    generalist = wire.encode(bundle.manifest, adapters.load_fresh(bundle))
    with contextlib.closing(State(options.state)) as state:
        state.begin(_settings(options.policy, contract_sha256(bundle.manifest)), generalist)
        rounds = Rounds(state=state, manifest=bundle.manifest, policy=options.policy, report=report)
        service = Service(state=state, rounds=rounds, manifest=bundle.manifest, report=report)
        async with _listening(options, host, port, service) as bound:
            ca = None if options.insecure else str(options.state / CA_FILE)
            report("listening", {"address": f"{host}:{bound}", "ca": ca})
            await _run(rounds, service, report, exit_when_done=options.exit_when_done)


def _settings(policy: Policy, contract: str) -> Settings:
    return Settings(
        contract_sha256=contract,
        rounds=policy.rounds,
        min_devices=policy.min_devices,
        deadline_seconds=policy.deadline_seconds,
        recipe=str(policy.recipe),
        selection=None if policy.selection is None else str(policy.selection),
        training=json_format.MessageToJson(policy.training, preserving_proto_field_name=True),
    )


@contextlib.asynccontextmanager
async def _listening(
    options: Options, host: str, port: int, service: Service
) -> AsyncIterator[int]:
    """A started server as a context: yields its port, lets calls end on leaving."""
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, server)
    await _add_standard_services(server)
    try:
        if options.insecure:
            bound = server.add_insecure_port(f"{host}:{port}")
        else:
            made = server_credentials(options.state, [host.strip("[]"), *options.names])
            credentials = grpc.ssl_server_credentials([(made.private_key, made.certificate_chain)])
            bound = server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise AddressError(
            f"cannot listen on {options.listen}: the port is in use or the address is not this "
            "machine's; stop what uses it, or choose another --listen (port 0 takes a free one)"
        ) from error
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(GRACE_SECONDS)


async def _add_standard_services(server: grpc.aio.Server) -> None:
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    for name in ("", SERVICE_NAME):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)


async def _run(rounds: Rounds, service: Service, report: Report, *, exit_when_done: bool) -> None:
    """Runs the rounds; returns when it is time to stop."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    course = asyncio.create_task(rounds.run())
    waiting = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({course, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if course.done():
            course.result()
            sizes = {"bytes_received": service.bytes_received, "bytes_sent": service.bytes_sent}
            report("finished", sizes)
            if not exit_when_done:
                await waiting
    finally:
        rounds.stop()
        for task in (course, waiting):
            task.cancel()
        await asyncio.gather(course, waiting, return_exceptions=True)


def _split(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise AddressError(
            f"{listen} is not an address to listen on; give HOST:PORT, for example 127.0.0.1:50051"
        )
    return host, int(port)
