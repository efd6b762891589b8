"""Puts the coordinator together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import grpc
from cryptography import x509
from google.protobuf import json_format
from threadpoolctl import threadpool_limits

from coordinator import accounting
from coordinator.admin import Address, Admin
from coordinator.aggregation.ranks import ordered
from coordinator.aggregation.updates import Layout
from coordinator.audit import COORDINATOR, AuditLog, Auditor
from coordinator.callers import Callers
from coordinator.calls import Calls
from coordinator.closing import read_start
from coordinator.cohorts import Cohort, Cohorts, Group, group, manifests_of
from coordinator.database import DamagedDatabaseError, InUseError, TakenOverError
from coordinator.enrolment import Enrolment
from coordinator.following import Following
from coordinator.limits import share_heap
from coordinator.link import Link
from coordinator.listening import (
    GRACE_SECONDS,
    WILDCARDS,
    Ports,
    bare,
    bind,
    reached,
    server,
    split,
    start,
    watch,
)
from coordinator.metrics import Metrics
from coordinator.monitor import Monitor
from coordinator.options import Options
from coordinator.overview import Live, Overview
from coordinator.policy import Policy, Report, to_all
from coordinator.quality import QualityGate
from coordinator.rounds import Rounds
from coordinator.secure_aggregation import SecureAggregation
from coordinator.service import Service
from coordinator.state import State
from coordinator.tables import Settings
from coordinator.tls import ADMIN_FILE, Authority, administrator, subject_of
from edge_runtime import adapters, compression, wire
from edge_runtime.adapters import Vectors
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.connection import Traffic
from edge_runtime.errors import MissingPartError, StorageError
from edge_runtime.identity import read_identity, write_identity
from protos import coordinator_pb2_grpc, link_pb2_grpc, manifest_pb2

if TYPE_CHECKING:  # it needs packages of the extra "tracing"
    from coordinator.tracing import Tracing

# Calls at once of a coordinator that follows: two of each device that it serves, and some.
LINK_STREAMS = 100_000
# How often one that stands by looks whether the coordinator in front of it is gone.
STANDBY_SECONDS = 0.5
# How often one that may have been taken over without its noticing looks.
CHECK_SECONDS = 5.0


async def serve(options: Options, report: Report) -> None:
    """Runs rounds until SIGTERM or SIGINT or, with `exit_when_done`, the end of the last one.

    Raises:
        BundleError: no usable bundle, or the state belongs to another one.
        CohortsError: further cohorts were asked for, and the bundles share no generalist.
        AddressError: the address is malformed or cannot be listened on.
        StorageError: the state directory is in use or cannot be written, or another coordinator has
            taken it over.
        ValueError, MissingPartError, VersionError: see `State`.
        AuditError: the audit log in the state directory cannot be continued.
        TrustError: the authority or the administrator's file in the state directory is damaged.
        UnsoundError: its rounds and the wanted ones do not go together in privacy.
    """
    os.umask(0o077)  # the state may be in a directory that others can enter
    share_heap()
    # Of numpy's products: two cohorts that close rounds would undo each other's.
    threadpool_limits(1)
    report = to_all(report, _tell_service_manager)
    bundles = [open_bundle(path) for path in options.bundles]
    fresh = {bundle.path: adapters.load_fresh(bundle) for bundle in bundles}
    split(options.listen)
    stopped = _stop_signals()
    taken = await _take_state(options, bundles, report, stopped)
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
        known = state.cohorts()
        groups = group(
            bundles,
            mixed=options.policy.recipe.ranks is not None,
            known=known,
            names=options.cohorts,
        )
        async with contextlib.AsyncExitStack() as running:
            # Whatever can be wrong comes first: a start that fails has not changed the settings.
            for each in groups:
                new = each.name not in known
                checking = _check(each, state.of(each.name), new, options, report)
                if not await _came_to_its_end(checking, stopped):
                    return
            doors = (_Insecure if options.insecure else _Secure)(options, live.calls)
            if options.monitor is not None:
                report("monitoring", {"address": _monitor(options, metrics, overview, running)})
            cohorts = Cohorts(
                [
                    _begin(each, fresh[each.bundles[0].path], state, options, report)
                    for each in groups
                ]
            )
            fresh.clear()  # they are on the disk now
            cohorts.clean()
            for cohort in cohorts.all:
                metrics.begin(cohort.state.current().number, cohort.name)
                running.push_async_callback(cohort.rounds.settled)
            parts = _Parts(
                options=options,
                state=state,
                cohorts=cohorts,
                live=live,
                auditor=auditor,
                report=report,
            )
            names = [cohort.name for cohort in cohorts.all]
            report("listening", {**await doors.open(parts, running), "cohorts": names})
            try:
                await _run(parts, stopped)
            finally:
                auditor.note("stopped", COORDINATOR, {})


async def _take_state(
    options: Options, bundles: Sequence[Bundle], report: Report, stopped: asyncio.Event
) -> State | None:
    """The state, for this coordinator to lead. One in PostgreSQL is waited for, so that another
    machine or process can go on with it, and follows meanwhile; None if it is told to stop."""
    following: Following | None = None
    told = ""
    async with contextlib.AsyncExitStack() as stack:
        while not stopped.is_set():
            try:
                try:
                    return State(options.state, options.database)
                except InUseError:
                    if options.database is None:
                        raise
                if following is None:
                    gate = options.policy.gate
                    if gate and not await _came_to_its_end(gate.check(None), stopped):
                        return None  # a gate that cannot measure must show now, not at the takeover
                    report("standing_by", {"state": str(options.state)})
                    following = Following(options, bundles, report)
                    stack.push_async_callback(following.close)
                if not options.insecure:
                    await following.look()
            except StorageError as error:
                if following is None:
                    raise
                if str(error) != told:
                    told = str(error)
                    report("not_ready", {"reason": told})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), STANDBY_SECONDS)
    return None


async def _check(group: Group, state: State, new: bool, options: Options, report: Report) -> None:
    """Finds out, before anything is stored, whether the rounds of a cohort can begin or go on.

    Raises:
        UnsoundError: see `accounting.check`.
        AdapterError: see `read_start`.
        ComigsError: the quality gate cannot measure.
    """
    accounting.check(state, options.policy.privacy)
    current = None if new else state.current()
    if current is not None:
        read_start(state.directory, current)
    if (gate := _gate(options.policy, group)) is None:
        return
    measured = await gate.check(
        None if current is None else state.directory / current.generalist_file
    )
    number = 1 if current is None else current.number
    report("quality_measured", {"cohort": group.name, "round": number, "perplexity": measured})


async def _came_to_its_end(work: Coroutine[Any, Any, object], stopped: asyncio.Event) -> bool:
    """Whether `work` did, before the coordinator was told to stop; raises what that raises."""
    try:
        await _until_one_ends(work, stopped.wait())
    except Exception:  # of no interest then: Ctrl-C ends a measurement, too
        if not stopped.is_set():
            raise
    return not stopped.is_set()


def _gate(policy: Policy, group: Group) -> QualityGate | None:
    """The quality gate of one cohort."""
    return policy.gate and replace(policy.gate, bundle=group.bundles[0].path)


def _begin(
    group: Group, generalist: Vectors, whole: State, options: Options, report: Report
) -> Cohort:
    """The cohort as it was left, or at its first round, which starts from `generalist`."""
    state, bundle = whole.of(group.name), group.bundles[0]
    policy = replace(options.policy, gate=_gate(options.policy, group))
    state.keep_generalists = options.keep_generalists
    if policy.recipe.ranks == "flexlora":
        generalist = ordered(Layout(bundle.manifest), generalist)

    def named(event: str, fields: dict[str, Any]) -> None:
        report(event, {"cohort": group.name, **fields})

    settings = _settings(policy, group.contract_sha256)
    changed = state.begin(settings, wire.encode(bundle.manifest, generalist))
    if changed:
        named("settings_changed", {"changes": changed})
    rounds = Rounds(
        state=state,
        manifest=bundle.manifest,
        manifests=manifests_of(group),
        policy=policy,
        report=named,
        masked=_masked(options, state, bundle.manifest),
    )
    return Cohort(group, state=state, counting=rounds)


def _settings(policy: Policy, contract: str) -> Settings:
    offered = {kind: name for name, kind in compression.NAMES.items()}
    return Settings(
        contract_sha256=contract,
        rounds=policy.rounds,
        min_devices=policy.min_devices,
        deadline_seconds=policy.deadline_seconds,
        recipe=str(policy.recipe),
        selection=None if policy.selection is None else str(policy.selection),
        asynchronous=None if policy.buffering is None else str(policy.buffering),
        gate=None if policy.gate is None else str(policy.gate),
        secure_aggregation=None if policy.masking is None else str(policy.masking),
        privacy=None if policy.privacy is None else str(policy.privacy),
        compression=", ".join(offered[kind] for kind in policy.compressions) or None,
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
        training=options.policy.training,
        size=Layout(manifest).size,
        authority=x509.load_der_x509_certificate(authority.der),
    )


@dataclass(frozen=True)
class _Parts:
    """What the services are made of."""

    options: Options
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
    host, port = split(options.monitor)
    names = (*options.names, host)
    monitor = Monitor(host, port, names=names, metrics=metrics.text, overview=overview)
    stack.callback(monitor.close)
    for measuring in (metrics.watch_loop(), overview.sample()):
        stack.callback(asyncio.create_task(measuring).cancel)
    return monitor.address


class _Secure:
    """What listens with TLS."""

    def __init__(self, options: Options, calls: Calls) -> None:
        """Takes the ports; nobody is answered there yet.

        Raises:
            AddressError: they cannot be listened on.
            StorageError: the authority is new and cannot be written, or a file cannot be read.
            TrustError: the authority or the administrator's file is damaged.
        """
        self._authority = Authority.open(options.state, options.certificate_lifetime)
        self._administrator = read_identity(options.state / ADMIN_FILE)
        self._ports = Ports.open(options, self._authority, calls)

    async def open(self, parts: _Parts, stack: contextlib.AsyncExitStack) -> dict[str, Any]:
        """Listens until `stack` unwinds.

        Returns:
            The fields of the event "listening".
        """
        options, authority, ports = parts.options, self._authority, self._ports
        host = reached(ports.host, options.names)
        before = self._administrator
        holder = administrator(authority, before, f"{host or 'localhost'}:{ports.port}")
        holder_id = subject_of(holder.certificate.encode()).id
        if before is None or before.certificate != holder.certificate:  # told before it is one
            await parts.log("administrator_made", {"administrator": holder_id})
        if holder != before:
            write_identity(options.state / ADMIN_FILE, holder)
        callers = parts.callers(holder_id)
        parts.live.calls.administrator = holder_id
        service = parts.service(callers, authority)
        admin = Admin(
            state=parts.state,
            cohorts=parts.cohorts,
            callers=callers,
            address=Address(
                host=host,
                port=ports.port,
                enrolment_port=ports.enrolment_port,
                authority=authority.der,
            ),
            report=parts.report,
        )
        enrolment = Enrolment(
            state=parts.state,
            callers=callers,
            authority=authority,
            cohorts=parts.cohorts,
            traffic=parts.live.traffic,
            report=parts.report,
        )
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, ports.main)
        coordinator_pb2_grpc.add_AdminServicer_to_server(admin, ports.main)
        coordinator_pb2_grpc.add_EnrolmentServicer_to_server(enrolment, ports.enrolment)
        await ports.start(stack)
        watched = [ports.port, ports.enrolment_port]
        if options.database is not None:
            link, bound = _link(parts, authority, callers, ports.host)
            coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, link)
            coordinator_pb2_grpc.add_AdminServicer_to_server(admin, link)
            coordinator_pb2_grpc.add_EnrolmentServicer_to_server(enrolment, link)
            await link.start()
            stack.push_async_callback(link.stop, GRACE_SECONDS)
            watched.append(bound)
            parts.state.announce("" if bare(ports.host) in WILDCARDS else ports.host, bound)
        watch(stack, parts.report, options.limits, *watched)
        address = ports.addresses
        await parts.log("started", {"address": address["address"], "administrator": holder_id})
        return {**address, "admin": str(options.state / ADMIN_FILE)}


def _link(
    parts: _Parts, authority: Authority, callers: Callers, host: str
) -> tuple[grpc.aio.Server, int]:
    """What listens for coordinators that follow, which speak for many devices, and its port."""
    options = parts.options.limits.channel_options(streams=LINK_STREAMS)
    link = grpc.aio.server(options=options, interceptors=[parts.live.calls])
    link_pb2_grpc.add_LinkServicer_to_server(
        Link(
            state=parts.state,
            cohorts=parts.cohorts,
            callers=callers,
            auditor=parts.auditor,
            masked=parts.options.policy.masking is not None,
            compressions=parts.options.policy.compressions,
            report=parts.report,
        ),
        link,
    )
    made = authority.server_credentials([bare(host)])
    pair = (made.private_key, made.certificate_chain)
    # Devices do not come in here, where nothing limits how much one connection may ask for.
    callers_of = authority.for_links().pem
    mutual = grpc.ssl_server_credentials([pair], callers_of, require_client_auth=True)
    return link, bind(link, host, 0, "--listen", mutual)


class _Insecure:
    """Likewise without TLS, so without enrolment, administrator, and others that follow."""

    def __init__(self, options: Options, calls: Calls) -> None:
        self._host, port = split(options.listen)
        self._main = server(options.limits, calls)
        self._port = bind(self._main, self._host, port, "--listen", None)

    async def open(self, parts: _Parts, stack: contextlib.AsyncExitStack) -> dict[str, Any]:
        service = parts.service(parts.callers(administrator=None), authority=None)
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, self._main)
        await start(self._main, ["Coordinator"], stack)
        watch(stack, parts.report, parts.options.limits, self._port)
        address = f"{self._host}:{self._port}"
        await parts.log("started", {"address": address, "administrator": None})
        return {"address": address, "enrolment": None, "admin": None}


def _tell_service_manager(event: str, fields: dict[str, Any]) -> None:
    """Tells systemd, if that started the coordinator, that it has started: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address is None or event not in {"listening", "standing_by"}:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        # A path, or with an @ a name in the abstract namespace.
        manager.connect("\0" + address[1:] if address.startswith("@") else address)
        manager.send(b"READY=1")


def _stop_signals() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


async def _run(parts: _Parts, stopped: asyncio.Event) -> None:
    """Runs the rounds; returns when it is time to stop."""
    # What is here now stays. Looking for garbage among it, too, kept every call waiting.
    gc.collect()
    gc.freeze()
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
        except (TakenOverError, DamagedDatabaseError):
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

    rounds = (run(cohort) for cohort in parts.cohorts.all)
    await _until_one_ends(*rounds, *([over.wait()] if parts.options.exit_when_done else []))


async def _until_one_ends(*work: Coroutine[Any, Any, object]) -> None:
    """Runs them all; when one has ended, raises what it raised, and cancels the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
