"""Puts the coordinator together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from cryptography import x509
from google.protobuf import json_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator import accounting
from coordinator.admin import Address, Admin
from coordinator.aggregation.ranks import ordered
from coordinator.aggregation.updates import Layout
from coordinator.audit import COORDINATOR, AuditLog, Auditor
from coordinator.callers import Callers
from coordinator.calls import Calls
from coordinator.cohorts import Cohort, Cohorts, Group, group, manifests_of
from coordinator.database import InUseError, TakenOverError
from coordinator.enrolment import Enrolment
from coordinator.limits import Limits, raise_file_limit, share_heap, watch_connections
from coordinator.metrics import Metrics
from coordinator.monitor import Monitor
from coordinator.overview import Live, Overview
from coordinator.policy import Policy, Report, to_all
from coordinator.rounds import Rounds
from coordinator.secure_aggregation import SecureAggregation
from coordinator.service import Service
from coordinator.state import State
from coordinator.tables import Settings
from coordinator.tls import ADMIN_FILE, Authority, administrator, subject_of
from edge_runtime import adapters, wire
from edge_runtime.adapters import Vectors
from edge_runtime.bundle import open_bundle
from edge_runtime.connection import Traffic
from edge_runtime.errors import AddressError, MissingPartError, StorageError
from edge_runtime.identity import read_identity
from protos import coordinator_pb2, coordinator_pb2_grpc, manifest_pb2

if TYPE_CHECKING:  # it needs packages of the extra "tracing"
    from coordinator.tracing import Tracing

WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - recognised, not listened on
# How long calls that are being answered may take to end when the coordinator stops.
GRACE_SECONDS = 5.0
# How often one that stands by looks whether the coordinator in front of it is gone.
STANDBY_SECONDS = 0.5
# How often one that may have been taken over without its noticing looks.
CHECK_SECONDS = 5.0


@dataclass(frozen=True)
class Options:
    """What `comigs serve` was asked for."""

    bundles: tuple[Path, ...]
    cohorts: tuple[str, ...]
    """Names of further cohorts of these bundles."""
    listen: str
    """HOST:PORT; port 0 takes a free one."""
    enrolment_port: int | None
    """Where invitations are used; None: the port after `listen`'s, or a free one if that is 0."""
    state: Path
    database: str | None
    """URL of a PostgreSQL database for the rows; None: SQLite, in `state`."""
    policy: Policy
    names: tuple[str, ...]
    """Further host names and IP addresses for the certificate; devices are told the first."""
    certificate_lifetime: datetime.timedelta
    """Of the certificates that devices get."""
    limits: Limits
    insecure: bool
    exit_when_done: bool
    monitor: str | None = None
    """HOST:PORT of metrics and dashboard; None: neither."""
    traces: str | None = None
    """URL of an OpenTelemetry collector; None: no traces."""
    keep_generalists: int | None = None
    """How many of each cohort; None: all."""


async def serve(options: Options, report: Report) -> None:
    """Runs rounds until SIGTERM or SIGINT or, with `exit_when_done`, the end of the last one.

    Raises:
        BundleError: no usable bundle, or the state belongs to another one.
        CohortsError: further cohorts were asked for, and the bundles share no generalist.
        AddressError: the address is malformed or cannot be listened on.
        StorageError: the state directory is in use or cannot be written, or another coordinator has
            taken it over.
        ValueError, MissingPartError: see `Postgres`.
        AuditError: the audit log in the state directory cannot be continued.
        TrustError: the authority or the administrator's file in the state directory is damaged.
        UnsoundError: its rounds and the wanted ones do not go together in privacy.
    """
    os.umask(0o077)  # the state may be in a directory that others can enter
    share_heap()
    bundles = [open_bundle(path) for path in options.bundles]
    fresh = {bundle.path: adapters.load_fresh(bundle) for bundle in bundles}
    host, port = _split(options.listen)
    stopped = _stop_signals()
    taken = await _take_state(options, report, stopped)
    if taken is None:
        return
    with (
        contextlib.ExitStack() as stack,
        contextlib.closing(taken) as state,
        contextlib.closing(AuditLog(options.state)) as log,
        contextlib.closing(Auditor(log)) as auditor,
    ):
        live = Live(calls=Calls(auditor), traffic=Traffic())
        metrics, overview = Metrics(live), Overview(options.state, live, options.database)
        live.calls.observers.append(metrics.ended)
        report = to_all(report, auditor.observe, metrics.observe, overview.observe)
        if options.traces is not None:
            tracing = stack.enter_context(contextlib.closing(_tracing(options.traces)))
            live.calls.observers.append(tracing.ended)
            report = to_all(report, tracing.observe)
        groups = group(
            bundles,
            mixed=options.policy.recipe.ranks is not None,
            known=state.cohorts(),
            names=options.cohorts,
        )
        cohorts = Cohorts(
            [
                await _begin(each, fresh[each.bundles[0].path], state, options, report)
                for each in groups
            ]
        )
        fresh.clear()  # they are on the disk now
        for cohort in cohorts.all:
            metrics.begin(cohort.state.current().number, cohort.name)
        parts = _Parts(
            options=options,
            host=host,
            port=port,
            state=state,
            cohorts=cohorts,
            live=live,
            auditor=auditor,
            report=report,
        )
        async with contextlib.AsyncExitStack() as running:
            for cohort in cohorts.all:
                running.push_async_callback(cohort.rounds.settled)
            if options.monitor is not None:
                report("monitoring", {"address": _monitor(options, metrics, overview, running)})
            listening = _insecure(parts, running) if options.insecure else _secure(parts, running)
            names = [cohort.name for cohort in cohorts.all]
            report("listening", {**await listening, "cohorts": names})
            try:
                await _run(parts, stopped)
            finally:
                auditor.note("stopped", COORDINATOR, {})


async def _take_state(options: Options, report: Report, stopped: asyncio.Event) -> State | None:
    """The state, for this coordinator alone. One in PostgreSQL is waited for, so that another
    machine or process can go on with it; None if this one is told to stop meanwhile."""
    waiting = False
    while not stopped.is_set():
        try:
            return State(options.state, options.database)
        except InUseError:
            if options.database is None:
                raise
            if not waiting:
                report("standing_by", {"state": str(options.state)})
            waiting = True
        except StorageError:
            if not waiting:
                raise
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), STANDBY_SECONDS)
    return None


async def _begin(
    group: Group, generalist: Vectors, whole: State, options: Options, report: Report
) -> Cohort:
    """The cohort as it was left, or at its first round, which starts from `generalist`."""
    state, bundle, policy = whole.of(group.name), group.bundles[0], options.policy
    state.keep_generalists = options.keep_generalists
    if policy.gate is not None:
        policy = replace(policy, gate=replace(policy.gate, bundle=bundle.path))
    if policy.recipe.ranks == "flexlora":
        generalist = ordered(Layout(bundle.manifest), generalist)

    def named(event: str, fields: dict[str, Any]) -> None:
        report(event, {"cohort": group.name, **fields})

    settings = _settings(policy, group.contract_sha256)
    changed = state.begin(settings, wire.encode(bundle.manifest, generalist))
    if changed:
        named("settings_changed", {"changes": changed})
    accounting.check(state, policy.privacy)
    if policy.gate is not None:
        current = state.current()
        measured = await policy.gate.check(options.state / current.generalist_file)
        named("quality_measured", {"round": current.number, "perplexity": measured})
    rounds = Rounds(
        state=state,
        manifest=bundle.manifest,
        manifests=manifests_of(group),
        policy=policy,
        report=named,
        masked=_masked(options, state, bundle.manifest),
    )
    return Cohort(group, state=state, rounds=rounds)


def _settings(policy: Policy, contract: str) -> Settings:
    return Settings(
        contract_sha256=contract,
        rounds=policy.rounds,
        min_devices=policy.min_devices,
        deadline_seconds=policy.deadline_seconds,
        recipe=str(policy.recipe),
        selection=None if policy.selection is None else str(policy.selection),
        asynchronous=None if policy.buffering is None else str(policy.buffering),
        gate=None if policy.gate is None else str(policy.gate),
        training=json_format.MessageToJson(policy.training, preserving_proto_field_name=True),
    )


def _masked(
    options: Options, state: State, manifest: manifest_pb2.Manifest
) -> SecureAggregation | None:
    if options.policy.masking is None:
        return None
    authority = Authority.open(options.state, options.certificate_lifetime)
    return SecureAggregation(
        state=state,
        masking=options.policy.masking,
        size=Layout(manifest).size,
        authority=x509.load_der_x509_certificate(authority.der),
    )


@dataclass(frozen=True)
class _Parts:
    """What the services are made of."""

    options: Options
    host: str
    port: int
    state: State
    cohorts: Cohorts
    live: Live
    auditor: Auditor
    report: Report

    async def log(self, event: str, fields: dict[str, Any]) -> None:
        """Puts into the audit log what the coordinator itself does."""
        await asyncio.wrap_future(self.auditor.record(event, COORDINATOR, fields))

    def callers(self, administrator: str | None) -> Callers:
        callers = Callers(
            state=self.state,
            cohorts=self.cohorts,
            administrator=administrator,
            calls_per_second=self.options.limits.calls_per_second,
        )
        self.live.connected = callers.connected
        return callers

    def service(self, callers: Callers, authority: Authority | None) -> Service:
        return Service(
            state=self.state,
            cohorts=self.cohorts,
            callers=callers,
            authority=authority,
            masked=self.options.policy.masking is not None,
            compressions=self.options.policy.compressions,
            traffic=self.live.traffic,
            limits=self.options.limits,
            report=self.report,
        )

    def watch(self, stack: contextlib.AsyncExitStack, *ports: int) -> None:
        """Holds the connections to `ports` to their limit per address until `stack` unwinds."""

        def report(address: str, count: int) -> None:
            self.report("connections_closed", {"address": address, "connections": count})

        most = self.options.limits.connections_per_address
        stack.callback(asyncio.create_task(watch_connections(ports, most, report)).cancel)


def _tracing(endpoint: str) -> Tracing:
    try:
        from coordinator.tracing import Tracing
    except ModuleNotFoundError as error:
        raise MissingPartError(
            f"{error.name} is not installed, which --traces needs; install it with "
            "`pip install 'comigs[tracing]'`"
        ) from error
    return Tracing(endpoint)


def _monitor(
    options: Options, metrics: Metrics, overview: Overview, stack: contextlib.AsyncExitStack
) -> str:
    """Starts to serve metrics and dashboard. Returns their address."""
    assert options.monitor is not None
    host, port = _split(options.monitor)
    monitor = Monitor(host, port, names=options.names, metrics=metrics.text, overview=overview)
    stack.callback(monitor.close)
    for measuring in (metrics.watch_loop(), overview.sample()):
        stack.callback(asyncio.create_task(measuring).cancel)
    return monitor.address


async def _secure(parts: _Parts, stack: contextlib.AsyncExitStack) -> dict[str, Any]:
    """Starts what listens with TLS: for those who have a certificate, and for those who want one.

    They need a port each: gRPC for Python either requires a client's certificate or takes none.

    Returns:
        The fields of the event "listening".
    """
    options, host, port = parts.options, parts.host, parts.port
    authority = Authority.open(options.state, options.certificate_lifetime)
    made = authority.server_credentials([host.strip("[]"), *options.names])
    pairs = [(made.private_key, made.certificate_chain)]
    main, enrolment = _server(parts), _server(parts)
    mutual = grpc.ssl_server_credentials(pairs, authority.pem, require_client_auth=True)
    bound = _bind(main, host, port, "--listen", mutual)
    wanted = options.enrolment_port
    if wanted is None:
        wanted = port and port + 1
    plain = grpc.ssl_server_credentials(pairs)
    bound_enrolment = _bind(enrolment, host, wanted, "--enrolment-port", plain)

    reached = _reached(host, options.names)
    before = read_identity(options.state / ADMIN_FILE)
    holder = administrator(authority, options.state, f"{reached or 'localhost'}:{bound}")
    holder_id = subject_of(holder.certificate.encode()).id
    if before is None or before.certificate != holder.certificate:
        await parts.log("administrator_made", {"administrator": holder_id})
    callers = parts.callers(holder_id)
    address = Address(
        host=reached,
        port=bound,
        enrolment_port=bound_enrolment,
        authority=authority.der,
    )
    admin = Admin(
        state=parts.state,
        cohorts=parts.cohorts,
        callers=callers,
        address=address,
        report=parts.report,
    )
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(parts.service(callers, authority), main)
    coordinator_pb2_grpc.add_AdminServicer_to_server(admin, main)
    coordinator_pb2_grpc.add_EnrolmentServicer_to_server(
        Enrolment(
            state=parts.state,
            callers=callers,
            authority=authority,
            cohorts=parts.cohorts,
            traffic=parts.live.traffic,
            report=parts.report,
        ),
        enrolment,
    )
    await _start(main, ["Coordinator", "Admin"], stack)
    await _start(enrolment, ["Enrolment"], stack)
    parts.watch(stack, bound, bound_enrolment)
    await parts.log("started", {"address": f"{host}:{bound}", "administrator": holder_id})
    return {
        "address": f"{host}:{bound}",
        "enrolment": f"{host}:{bound_enrolment}",
        "admin": str(options.state / ADMIN_FILE),
    }


async def _insecure(parts: _Parts, stack: contextlib.AsyncExitStack) -> dict[str, Any]:
    """Like `_secure` without TLS, so without enrolment and administrator."""
    main = _server(parts)
    bound = _bind(main, parts.host, parts.port, "--listen", None)
    service = parts.service(parts.callers(administrator=None), authority=None)
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, main)
    await _start(main, ["Coordinator"], stack)
    parts.watch(stack, bound)
    address = f"{parts.host}:{bound}"
    await parts.log("started", {"address": address, "administrator": None})
    return {"address": f"{parts.host}:{bound}", "enrolment": None, "admin": None}


def _server(parts: _Parts) -> grpc.aio.Server:
    limits = parts.options.limits
    limits = replace(limits, connections=raise_file_limit(limits.connections))
    return grpc.aio.server(options=limits.channel_options(), interceptors=[parts.live.calls])


def _bind(
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


async def _start(
    server: grpc.aio.Server, services: list[str], stack: contextlib.AsyncExitStack
) -> None:
    """Starts `server` with the standard services; it lets calls end when `stack` unwinds."""
    described = coordinator_pb2.DESCRIPTOR.services_by_name
    names = [described[service].full_name for service in services]
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    await server.start()
    stack.push_async_callback(server.stop, GRACE_SECONDS)


def _stop_signals() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


async def _run(parts: _Parts, stopped: asyncio.Event) -> None:
    """Runs the rounds; returns when it is time to stop."""
    tasks = [
        asyncio.create_task(what)
        for what in (_course(parts), _notice_takeover(parts.state), stopped.wait())
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for cohort in parts.cohorts.all:
            cohort.rounds.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _notice_takeover(state: State) -> None:
    """Raises TakenOverError when another coordinator has taken `state` over."""
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        try:
            state.check()
        except TakenOverError:
            raise
        except StorageError:
            pass  # the rounds see to it


async def _course(parts: _Parts) -> None:
    """Runs the rounds, again after a roll-back; returns after the last one if that is asked for."""
    running = {cohort.name for cohort in parts.cohorts.all}
    over = asyncio.Event()

    async def run(cohort: Cohort) -> None:
        while True:
            await cohort.rounds.run()
            running.discard(cohort.name)
            if not running:
                traffic = parts.live.traffic
                sizes = {"bytes_received": traffic.received, "bytes_sent": traffic.sent}
                parts.report("finished", sizes)
                over.set()
            await cohort.rounds.reopened()
            running.add(cohort.name)

    tasks = [asyncio.create_task(run(cohort)) for cohort in parts.cohorts.all]
    if parts.options.exit_when_done:
        tasks.append(asyncio.create_task(_until(over)))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until(event: asyncio.Event) -> None:
    await event.wait()


def _reached(host: str, names: Sequence[str]) -> str:
    """The host name or address by which devices come; empty if it is not known here."""
    name = names[0] if names else host.strip("[]")
    if name in WILDCARDS:
        return ""
    return f"[{name}]" if ":" in name else name


def _split(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise AddressError(
            f"{listen} is not an address to listen on; give HOST:PORT, for example 127.0.0.1:50051"
        )
    return host, int(port)
