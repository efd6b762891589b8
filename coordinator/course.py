"""The course of the rounds: who trains when, what counts, and when a round is over.

* The first round opens when `min_devices` devices are present, that is, waiting in a check-in. So
  does the round after an abandoned one: devices are not sent to train while too few are there.
* After an aggregated round the next one opens at once.
* Whoever checks in while a round is open takes part. The clock starts when the round opens.
* A round closes when nobody is missing and at least `min_devices` updates are there, or at the
  deadline. Missing are participants without an update and, so that a group stays together, devices
  that reported in the previous round and have not come back yet. A device that had an update
  refused is not waited for, nor sent to train again in that round; a revoked one neither.
* At the deadline with fewer updates the round is abandoned and its number is used up; so is a round
  whose updates amount to no usable generalist, or to one that the quality gate refuses. An update
  whose file got damaged is dropped, as if it had been refused.
* With a Selection, a round takes only some devices. It opens when as many are there as it selects,
  counting those that reported in the previous round, since they are about to come back; or, after
  GATHER_SECONDS more, with as many as it wants updates of. Who takes part is settled then; others
  wait for a later round. It also closes as soon as the wanted updates are there, and refuses those
  that come after.
* With Buffering, rounds are asynchronous: one opens as soon as a device is there, whoever checks in
  gets the generalist of the open one, and it closes when a number of updates count in it, whatever
  they started from, at no deadline. While it is being aggregated updates count in the next one. A
  device counts at most once in a round, and once for a generalist.
* The administrator can pause: then no round begins or ends, and nobody is sent to train. Updates
  are still accepted, so that no work is lost. After the pause the open round's clock starts again.
* The administrator can abort the open round, and roll back to what an earlier one started from.
  Its updates are dropped, and with a roll-back what the server optimizer remembers, too. A round
  that is being aggregated meanwhile comes to nothing.
* After a restart the open round goes on with the updates it has, and its clock starts again, since
  nobody could report while the coordinator was down. Otherwise clocks are monotonic: setting the
  machine's time ends no round.
* While the state cannot be written nothing moves; every step is tried again until it can.

What devices cause, such as an accepted update, is committed for many of them at once (`Commits`).
Everything else that changes the rounds is synchronous code on the event loop that holds the same
lock: it sees no half of such a commit, and a cancelled call cannot leave one. The aggregate is
computed in a thread, without the lock; while it is, the round is closed to updates.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from coordinator.acceptance import Acceptance
from coordinator.accounting import Ledger
from coordinator.aggregation import AggregationError, DamagedUpdateError
from coordinator.closing import Closing
from coordinator.commits import to_its_end
from coordinator.database import DamagedDatabaseError, TakenOverError
from coordinator.policy import Policy, Report
from coordinator.quality import Quality, QualityGate
from coordinator.secure_aggregation import LostSecretError, SecureAggregation
from coordinator.state import State
from coordinator.tables import MaskingMember, Round, Status, Update
from edge_runtime import wire
from edge_runtime.errors import AdapterError, ComigsError, StorageError
from protos import manifest_pb2

MAX_WAIT_SECONDS = 30.0
# A device that was told to wait counts as present for so long after it was last heard of.
PRESENT_SECONDS = MAX_WAIT_SECONDS + 5.0
# How long a round that could begin with fewer waits for all the devices that it would select.
GATHER_SECONDS = 5.0
# Between two attempts to go on while the state cannot be written.
STORAGE_SECONDS = 1.0
# Between two looks at whether a round can begin or end.
LOOK_SECONDS = 0.05
# Between two looks at whether the file of the generalist is still what it was.
INTACT_SECONDS = 60.0
# How long to wait for the last round's devices to store the final generalist.
DELIVERY_SECONDS = 60.0

T = TypeVar("T")


class Course(Acceptance):
    """The layer of Rounds that takes one step after the other."""

    def __init__(
        self,
        *,
        state: State,
        manifest: manifest_pb2.Manifest,
        manifests: Mapping[str, manifest_pb2.Manifest],
        policy: Policy,
        report: Report,
        masked: SecureAggregation | None = None,
    ) -> None:
        """
        Args:
            manifest: whose layout the generalist has.
            manifests: contract -> manifest, of the bundles that devices may have; that one too.
            masked: None: updates come as they are.
        """
        super().__init__(state=state, policy=policy, report=report, masked=masked)
        self._manifest = manifest
        self._ends = Closing(
            state=state,
            manifest=manifest,
            manifests=manifests,
            recipe=policy.recipe,
            masked=masked,
        )
        self._ledger = None if policy.privacy is None else Ledger(state, policy.privacy)
        self._told_spent = False
        self._stopping = False
        # When the open round's deadline is, by the monotonic clock.
        self._deadline: float | None = None
        # When the next round begins with fewer devices than it would select.
        self._gathered_by: float | None = None
        self._heard: dict[str, float] = {}
        # Wakes the check-ins that wait; replaced by a new one each time.
        self._changed = asyncio.Event()
        # All who wait wake at once; answering so many takes a while.
        self._waking = asyncio.Lock()
        # When it last woke, by the monotonic clock.
        self._looked = 0.0
        # Which generalist was intact, and until when that is believed.
        self._intact = ("", 0.0)

    async def run(self) -> None:
        """Runs until all rounds are over and delivered, or DELIVERY_SECONDS later."""
        await self._insist(self._resume)
        while True:
            self._nudged.clear()
            while await self._insist(self._advance):
                self._notify()
            if not await self._insist(self._is_finished):
                await self._wait_for_nudge(await self._insist(self._seconds_to_next))
            elif await self._deliver():
                return

    async def reopened(self) -> None:
        """Returns when there are rounds to run again after `run` has returned: when the
        administrator has rolled back."""
        while await self._insist(self._is_finished):
            self._nudged.clear()
            await self._wait_for_nudge(None)

    def stop(self) -> None:
        """Sends the devices that wait in a check-in away, to come back later."""
        self._stopping = True
        self._notify()

    async def _insist(self, step: Callable[[], Awaitable[T]]) -> T:
        """What `step` returns, which is tried until the state can be written.

        A step that failed has changed nothing, or has come so far that the next one goes on from
        there.
        """
        failed = False
        while True:
            try:
                result = await step()
            except (TakenOverError, DamagedDatabaseError):
                raise
            except StorageError as error:
                if not failed:
                    self._report("storage_failed", {"reason": str(error)})
                failed = True
                await asyncio.sleep(STORAGE_SECONDS)
            else:
                if failed:
                    self._report("storage_recovered", {})
                return result

    async def _resume(self) -> None:
        async with self._commits.still:
            self._go_on()

    def _go_on(self) -> None:
        """Goes on where the coordinator had ended."""
        current = self._without_buffered(self._state.current())
        if self._ledger is not None:
            left = max(0, self._policy.rounds - current.done)
            fields = {"rounds_left": self._ledger.rounds_left(left), "rounds_wanted": left}
            self._report("privacy", self._ledger.described() | fields)
        if current.status == Status.OPEN:
            deadline = self._start_clock()
            self._state.resume(current.number, deadline=deadline, recipe=self._recipe())
            updates = self._state.updates(current.number)
            fields = {"round": current.number, "updates": len(updates)}
            self._report("round_resumed", fields)
            group = self._state.masking_group(current.number)
            if self._masked is None:
                unfit = group is not None or self._state.count_masking(current.number) > 0
            else:
                plain = group is None and bool(updates)
                unfit = plain or not self._masked.fits(current.number, group)
            if current.done >= self._policy.rounds:
                self._abandon(current, updates, "no more rounds are wanted")
            elif unfit:
                reason = "it began with other training or privacy than it was resumed with"
                self._abandon(current, updates, reason)
            elif self._ledger is not None and not (
                self._state.has_spent(current.number) or self._ledger.allows_another()
            ):
                self._abandon(current, updates, "it would exceed the privacy budget")

    def _without_buffered(self, current: Round) -> Round:
        """The current round, after another one if updates count in it that were reported in
        asynchronous rounds: in others each counts in its own, and a device once."""
        number = current.number
        if self._policy.buffering is not None or not self._state.is_buffered(number):
            return current
        if current.status == Status.WAITING:
            self._state.drop_later(number - 1)
            return current
        self._state.drop_later(number)
        reason = "it began with asynchronous rounds, and these are not"
        self._abandon(current, self._state.updates(number), reason)
        return self._state.current()

    async def _advance(self) -> bool:
        """Takes the next step if it is due. Returns whether there may be another one."""
        async with self._commits.still:
            step = self._step()
        if not isinstance(step, bool):
            await self._aggregate(step)
            return True
        return step

    def _step(self) -> bool | Round:
        """Likewise; a round that is to be aggregated is only closed to updates, and returned."""
        current = self._state.current()
        self._check_start(current)
        if self._is_over(current) or current.paused:
            self._tell_if_spent(current)
            return False
        if current.status == Status.WAITING:
            return self._open(current)
        if self._masked is not None:
            return self._step_masked(self._masked, current)
        return self._close_if_due(current)

    def _close_if_due(self, current: Round) -> bool | Round:
        if self._policy.buffering is not None:
            return self._closed(current) if self._is_full(current.number) else False
        due = self._seconds_left(current) == 0
        enough = self._state.count_updates(current.number) >= self._policy.min_devices
        if enough and (due or self._is_complete(current.number)):
            return self._closed(current)
        if due:
            updates = self._state.updates(current.number)
            self._abandon(current, updates, "too few updates at its deadline")
            return True
        return False

    def _closed(self, current: Round) -> Round:
        self._closing = current.number
        return current

    def _step_masked(self, masked: SecureAggregation, current: Round) -> bool | Round:
        """Likewise, with secure aggregation: it begins when training is over."""
        number = current.number
        gone = self._state.unreliable(number)
        group = self._state.masking_group(number)
        try:
            if group is None:
                return self._settle(masked, current)
            if not masked.is_unmasked(group, gone):
                return masked.advance(group, gone)
        except AggregationError as error:
            self._abandon(current, self._state.updates(number), str(error))
            return True
        return self._closed(current)

    def _settle(self, masked: SecureAggregation, current: Round) -> bool:
        """Lets those who have trained begin with secure aggregation, if it is time."""
        number = current.number
        due = self._seconds_left(current) == 0
        if not due and not self._is_complete(number):
            return False
        trained = masked.advertised(number) - self._state.revoked()
        if len(trained) >= self._policy.min_devices:
            masked.settle(number, trained)
            self._report("masking_began", {"round": number, "devices": len(trained)})
            return True
        if due:
            self._abandon(current, [], "too few devices had trained at its deadline")
        return due

    def _open(self, waiting: Round) -> bool:
        participants = self._gather(waiting.number)
        if participants is None:
            return False
        self._state.open(
            waiting.number,
            deadline=self._start_clock(),
            recipe=self._recipe(),
            participants=participants,
        )
        self._report("round_opened", {"round": waiting.number})
        return True

    def _gather(self, number: int) -> Iterable[str] | None:
        """Devices with which round `number` can begin; None if it cannot yet."""
        present, returning = self._present(), self._reporters(number - 1)
        selection = self._policy.selection
        if selection is None:
            least = self._policy.min_devices if self._policy.buffering is None else 1
            return present if len(present) >= least or returning else None
        candidates = self._state.names(present | returning)
        if len(candidates) < selection.wanted:
            self._gathered_by = None
            return None
        if len(candidates) < selection.selected:
            if self._gathered_by is None:
                self._gathered_by = time.monotonic() + GATHER_SECONDS
            if time.monotonic() < self._gathered_by:
                return None
        self._gathered_by = None
        return [candidates[name] for name in selection.choose(number, candidates)]

    async def _aggregate(self, current: Round) -> None:
        """Ends a round that was closed to updates."""
        quality, updates, closed = None, list[Update](), False
        faults: Mapping[str, str] = {}
        try:
            updates = await asyncio.to_thread(self._state.updates, current.number)
            outcome = await asyncio.to_thread(self._ends.close, current, updates)
            generalist = wire.encode(self._manifest, outcome.generalist)
            if self._policy.gate is not None:
                quality = await self._measure(self._policy.gate, current, generalist)
            async with self._commits.still:
                if not self._is_still(current):
                    return
                noise = None if self._ledger is None else self._ledger.privacy.noise_multiplier
                if (objection := self._objection(quality)) is not None:
                    # Its quality is told, so it costs privacy like any other.
                    self._abandon(current, updates, objection, quality=quality, noise=noise)
                else:
                    aggregated = functools.partial(
                        self._state.aggregate,
                        current.number,
                        generalist,
                        outcome.memory,
                        quality=quality,
                        noise=noise,
                        reach=self._reach(),
                        clipped=outcome.clipped,
                        clipped_coordinates=outcome.clipped_coordinates,
                    )
                    await to_its_end(aggregated)
                    closed = True
            faults = outcome.faults
        except (AggregationError, AdapterError) as error:
            async with self._commits.still:
                if self._is_still(current):  # else its files may have been deleted meanwhile
                    faults = self._give_up(current, updates, error)
        finally:
            self._closing = None
        if closed:
            self._report(
                "round_closed",
                {
                    "round": current.number,
                    "updates": len(updates),
                    "clipped": outcome.clipped,
                    "clipped_coordinates": outcome.clipped_coordinates,
                    "seconds": round(max(0.0, time.time() - (current.opened_at or 0)), 3),
                    **_perplexities(quality),
                },
            )
            self._report_spent(current)
            # A round's files are many; nobody waits for that.
            await asyncio.to_thread(self._state.clean)
        await self._refuse_shares(current, faults)

    async def _measure(self, gate: QualityGate, current: Round, generalist: bytes) -> Quality:
        try:
            return await gate.compare(self._ends.start_of(current), generalist)
        except ComigsError as error:
            raise AggregationError(f"what came of it could not be measured: {error}") from error

    def _objection(self, quality: Quality | None) -> str | None:
        gate = self._policy.gate
        return None if gate is None or quality is None else gate.objection(quality)

    def _give_up(
        self, current: Round, updates: list[Update], error: Exception
    ) -> Mapping[str, str]:
        """What there is to do when a round could not be closed. Returns what is to be told of who
        kept it from that: device -> what it did."""
        if isinstance(error, DamagedUpdateError):
            self._drop(current, error)
            return {}
        if isinstance(error, AdapterError):
            raise error
        if isinstance(error, LostSecretError) and self._may_get_more(current.number):
            return {}
        self._abandon(current, updates, str(error))
        return error.faults if isinstance(error, LostSecretError) else {}

    def _may_get_more(self, number: int) -> bool:
        """Whether devices may yet reveal shares of the round's masks."""
        group = self._state.masking_group(number)
        if group is None or self._masked is None:
            return False
        return self._masked.may_get_more(group, self._state.unreliable(number))

    async def _refuse_shares(self, current: Round, faults: Mapping[str, str]) -> None:
        """Records what devices did (device -> what) to keep a sum from being known."""
        for device in self._state.devices() if faults else ():
            if device.id in faults:
                number, reason = current.number, faults[device.id]
                await self._insist(functools.partial(self.refuse_shares, device, number, reason))

    def _drop(self, current: Round, damage: DamagedUpdateError) -> None:
        """Goes on without an accepted update."""
        name = self._state.drop_update(current.number, damage.device, str(damage))
        fields = {"round": current.number, "device": name, "reason": str(damage)}
        self._report("update_damaged", fields)

    def _check_start(self, current: Round) -> None:
        """Looks now and then whether the generalist is what was stored, raising as
        `Closing.read_start`: from a damaged one no download would ever succeed."""
        file, until = self._intact
        if file != current.generalist_file or time.monotonic() >= until:
            self._ends.read_start(current)
            self._intact = current.generalist_file, time.monotonic() + INTACT_SECONDS

    def _is_still(self, closing: Round) -> bool:
        """Whether the administrator let a round that is being aggregated go on."""
        current = self._state.current()
        return current.number == closing.number and not current.paused

    def _abandon(
        self,
        current: Round,
        updates: list[Update],
        reason: str,
        *,
        command: str | None = None,
        quality: Quality | None = None,
        noise: float | None = None,
    ) -> None:
        self._state.abandon(
            current.number,
            reason,
            command=command,
            quality=quality,
            noise=noise,
            reach=self._reach(),
        )
        self._report_abandoned(current, updates, reason, quality)

    def _report_abandoned(
        self, current: Round, updates: list[Update], reason: str, quality: Quality | None = None
    ) -> None:
        fields = {"round": current.number, "updates": len(updates), "reason": reason}
        self._report("round_abandoned", fields | _perplexities(quality))
        self._report_spent(current)

    def _report_spent(self, current: Round) -> None:
        if self._ledger is not None and self._state.has_spent(current.number):
            self._report("privacy_spent", {"round": current.number, **self._ledger.described()})

    async def _deliver(self) -> bool:
        """Waits until the last round's participants have the final generalist.

        Returns:
            Whether it is over: not if the administrator rolls back meanwhile.
        """
        end = time.monotonic() + DELIVERY_SECONDS
        while await self._insist(self._is_finished):
            self._nudged.clear()
            if not await self._insist(self._undelivered) or time.monotonic() >= end:
                return True
            await self._wait_for_nudge(end - time.monotonic())
        return False

    def _is_over(self, current: Round) -> bool:
        """Whether all rounds have been run, or another would exceed the privacy budget."""
        return current.done >= self._policy.rounds or self._is_spent(current)

    def _is_spent(self, current: Round) -> bool:
        """Whether the privacy budget keeps the round from being opened."""
        waiting = current.status == Status.WAITING
        return waiting and self._ledger is not None and not self._ledger.allows_another()

    def _tell_if_spent(self, current: Round) -> None:
        if self._ledger is None or self._told_spent or current.done >= self._policy.rounds:
            return
        if self._is_spent(current):
            self._told_spent = True
            self._report("budget_spent", {"round": current.number, **self._ledger.described()})

    def _is_complete(self, number: int) -> bool:
        """Whether the round has the updates that it should have before it closes early."""
        returning = self._policy.selection is None
        done = Update if self._masked is None else MaskingMember
        return self._is_full(number) or not self._state.misses_any(
            number, returning=returning, done=done
        )

    async def _undelivered(self) -> set[str]:
        """Participants of the last round, and of those before it whose updates could count in it,
        that have not stored what came of it."""
        last = self._state.round(self._state.last_aggregated())
        if last is None:  # the quality gate turned down all that the privacy budget allowed
            return set()
        delivered = self._state.delivered(self._state.current().number)
        took_part: set[str] = set()
        for number in range(last.oldest, last.number + 1):
            took_part |= self._state.participants(number)
        return took_part - delivered - self._state.revoked()

    def _reporters(self, number: int) -> set[str]:
        """Devices whose updates went into round `number` and which may come back.

        There are none if it was not aggregated.
        """
        ended = self._state.round(number)
        if ended is None or ended.status != Status.AGGREGATED:
            return set()
        return {update.device for update in self._state.updates(number)} - self._state.revoked()

    def _present(self) -> set[str]:
        oldest = time.monotonic() - PRESENT_SECONDS
        return {device for device, heard in self._heard.items() if heard >= oldest}

    async def _is_finished(self) -> bool:
        return self._is_over(self._state.current())

    def _recipe(self) -> str:
        """How rounds are aggregated, for people."""
        buffering = self._policy.buffering
        return str(self._policy.recipe) + (f", {buffering}" if buffering else "")

    def _reach(self) -> int | None:
        """How many generalists ago an update may have started; None without asynchronous rounds."""
        return None if self._policy.buffering is None else self._policy.buffering.max_staleness

    def _start_clock(self) -> float | None:
        """The deadline of a round that opens or resumes now, in seconds since the epoch."""
        if self._policy.buffering is not None:
            self._deadline = None
            return None
        self._deadline = time.monotonic() + self._policy.deadline_seconds
        return time.time() + self._policy.deadline_seconds

    def _seconds_left(self, current: Round) -> float | None:
        """Until the round's deadline, at least 0; None if it has none yet."""
        if current.status != Status.OPEN or self._deadline is None:
            return None
        return max(0.0, self._deadline - time.monotonic())

    async def _seconds_to_next(self) -> float | None:
        """Until the next step may be due though nothing happens; None if it cannot."""
        current = self._state.current()
        if current.paused:
            return None
        if self._gathered_by is not None:
            return max(0.0, self._gathered_by - time.monotonic())
        group = self._state.masking_group(current.number)
        if group is not None and self._masked is not None:
            return self._masked.seconds_left(group)
        return self._seconds_left(current)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for_nudge(self, seconds: float | None) -> None:
        """Not more often than every LOOK_SECONDS: many devices may report at once."""
        await wait(self._nudged, seconds)
        await asyncio.sleep(max(0.0, self._looked + LOOK_SECONDS - time.monotonic()))
        self._looked = time.monotonic()


def _perplexities(quality: Quality | None) -> dict[str, Any]:
    """An event's fields about what the quality gate measured; none without it."""
    return {} if quality is None else {"perplexity": vars(quality)}


async def wait(event: asyncio.Event, seconds: float | None) -> None:
    """Returns when `event` is set or after `seconds` (None: never)."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
