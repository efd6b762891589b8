"""A coordinator that follows: it serves devices beside the one that leads.

Check-ins, and everything else that is small, it passes on. Downloads it serves itself, and it takes
in updates, checks them and puts their files into the state directory; then the leader counts them.
It writes no rows.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from coordinator.callers import Callers
from coordinator.calls import Calls
from coordinator.cohorts import Cohort, Cohorts, CohortsError, group
from coordinator.database import FollowedPostgres
from coordinator.link import Leader, UndecidedError, served
from coordinator.listening import Ports, watch
from coordinator.options import Options
from coordinator.policy import Report
from coordinator.service import Service
from coordinator.state import State
from coordinator.tables import Device
from coordinator.tls import CA_FILE, Authority
from edge_runtime.bundle import Bundle
from edge_runtime.connection import Traffic
from edge_runtime.errors import BundleError, StorageError
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

if TYPE_CHECKING:  # this name is in the stub only
    from protos.coordinator_pb2_grpc import _ServicerContext as Context

SERVICES = pb.DESCRIPTOR.services_by_name
# How often it is looked whether devices that transfer something were revoked.
LOOK_SECONDS = 1.0


class FollowingService(Service):
    """Answers devices as the leader has it."""

    def __init__(self, leader: Leader, **parts: Any) -> None:
        super().__init__(**parts)
        self._passing = leader.passing(SERVICES["Coordinator"])

    async def CheckIn(self, request: pb.CheckInRequest, context: Context) -> pb.CheckInReply:  # noqa: N802
        reply: pb.CheckInReply = await self._pass_on("CheckIn", request, context)
        return reply

    async def Aggregate(  # noqa: N802
        self, request: pb.AggregateRequest, context: Context
    ) -> pb.AggregateReply:
        reply: pb.AggregateReply = await self._pass_on("Aggregate", request, context)
        return reply

    async def Renew(self, request: pb.SigningRequest, context: Context) -> pb.Certificate:  # noqa: N802
        reply: pb.Certificate = await self._pass_on("Renew", request, context)
        return reply

    async def _pass_on(self, method: str, request: Any, context: Context) -> Any:
        self._traffic.receive(request)
        return self._traffic.send(await self._passing[method](request, context))

    @contextlib.asynccontextmanager
    async def _member(self, context: Context) -> AsyncIterator[tuple[Device, Cohort]]:
        try:
            async with super()._member(context) as member:
                yield member
        except UndecidedError as error:
            await context.abort(error.code, str(error))


class Following:
    """Follows whoever leads, until it is closed."""

    def __init__(self, options: Options, bundles: Sequence[Bundle], report: Report) -> None:
        assert options.database is not None
        self._options = options
        self._bundles = bundles
        self._report = report
        self._database = FollowedPostgres(options.database)
        self._leader: tuple[int, str] | None = None
        self._serving = contextlib.AsyncExitStack()

    async def close(self) -> None:
        await self._serving.aclose()
        self._database.close()

    async def look(self) -> None:
        """Goes on with another leader if there is one.

        Raises:
            AddressError: the address cannot be listened on.
            BundleError, CohortsError: see `group`.
            StorageError: what the leader has stored is not here; it may be looked again.
        """
        leader = self._database.leader()
        if leader is None or leader == self._leader:
            return
        await self._serving.aclose()
        async with contextlib.AsyncExitStack() as stack:
            try:
                await self._begin(leader[1], stack)
            except UndecidedError:
                return  # it is looked again
            self._serving = stack.pop_all()
        self._leader = leader

    async def _begin(self, address: str, stack: contextlib.AsyncExitStack) -> None:
        options = self._options
        state = stack.enter_context(
            contextlib.closing(State(options.state, options.database, following=True))
        )
        if not (options.state / CA_FILE).exists():  # opened, it would be made
            raise StorageError(
                f"{options.state} has no authority, so it is not the leader's; give its --state"
            )
        authority = Authority.open(options.state, options.certificate_lifetime)
        leader = Leader(address, authority)
        stack.push_async_callback(leader.close)
        terms = await leader.terms()
        try:
            groups = group(
                self._bundles,
                mixed=options.policy.recipe.ranks is not None,
                known=state.cohorts(),
                names=options.cohorts,
            )
        except (BundleError, CohortsError) as error:
            self._report("not_following", {"state": str(options.state), "reason": str(error)})
            return
        cohorts = Cohorts(
            [Cohort(each, state=state.of(each.name), counting=leader) for each in groups]
        )
        if served(cohorts) != list(terms.cohorts):
            reason = "the leader serves other bundles"
            self._report("not_following", {"state": str(options.state), "reason": reason})
            return
        calls = Calls(leader)
        callers = Callers(
            state=state,
            cohorts=cohorts,
            administrator="",
            calls_per_second=options.limits.calls_per_second,
        )
        ports = Ports.open(options, authority, calls)
        service = FollowingService(
            leader,
            state=state,
            cohorts=cohorts,
            callers=callers,
            authority=authority,
            masked=terms.secure_aggregation,
            compressions=tuple(terms.compressions),
            traffic=Traffic(),
            limits=options.limits,
            report=self._report,
        )
        coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, ports.main)
        ports.main.add_generic_rpc_handlers([leader.handler(SERVICES["Admin"])])
        ports.enrolment.add_generic_rpc_handlers([leader.handler(SERVICES["Enrolment"])])
        # When this one takes the lead, transfers go on from where they were.
        await ports.start(stack, grace=0.0)
        watch(stack, self._report, options.limits, ports.port, ports.enrolment_port)
        stack.callback(asyncio.create_task(_shut_out_revoked(callers)).cancel)
        self._report("following", ports.addresses)


async def _shut_out_revoked(callers: Callers) -> None:
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        with contextlib.suppress(StorageError):
            callers.shut_out_revoked()
