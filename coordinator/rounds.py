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
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from coordinator.accounting import Ledger
from coordinator.aggregation import (
    AggregationError,
    DamagedUpdateError,
)
from coordinator.buffering import Buffering
from coordinator.closing import Closing
from coordinator.commits import Commits, to_its_end
from coordinator.database import TakenOverError
from coordinator.policy import (
    NoSuchRoundError,
    Policy,
    Reason,
    RefusedCommandError,
    RefusedUpdateError,
    Report,
    TryAgainError,
)
from coordinator.quality import Quality, QualityGate
from coordinator.secure_aggregation import SecureAggregation, over
from coordinator.state import State
from coordinator.tables import (
    Change,
    Delivery,
    Device,
    MaskingMember,
    MaskingStep,
    Participant,
    Refusal,
    Round,
    Standing,
    Status,
    Update,
)
from edge_runtime import wire
from edge_runtime.errors import AdapterError, ComigsError, StorageError
from protos import coordinator_pb2 as pb
from protos import manifest_pb2

MAX_WAIT_SECONDS = 30.0
RETRY_SECONDS = 1.0
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

WAIT = pb.CheckInReply(action=pb.CheckInReply.WAIT, retry_seconds=RETRY_SECONDS)

T = TypeVar("T")


class Rounds:
    """The course of the rounds. One event loop, one instance per State."""

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
        self._state = state
        self._manifest = manifest
        self._policy = policy
        self._report = report
        self._masked = masked
        self._ends = Closing(
            state=state,
            manifest=manifest,
            manifests=manifests,
            recipe=policy.recipe,
            masked=masked,
        )
        self._ledger = None if policy.privacy is None else Ledger(state, policy.privacy)
        self._told_spent = False
        self._history = state.history()
        self._commits: Commits[Change] = Commits(state.commit)
        self._stopping = False
        self._closing: int | None = None
        # When the open round's deadline is, by the monotonic clock.
        self._deadline: float | None = None
        # When the next round begins with fewer devices than it would select.
        self._gathered_by: float | None = None
        self._heard: dict[str, float] = {}
        # Wakes the check-ins that wait; replaced by a new one each time.
        self._changed = asyncio.Event()
        # All who wait wake at once; answering so many takes a while.
        self._waking = asyncio.Lock()
        # Wakes `run`.
        self._nudged = asyncio.Event()
        # When it last woke, by the monotonic clock.
        self._looked = 0.0
        # Which generalist was intact, and until when that is believed.
        self._intact = ("", 0.0)

    # The course of things

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
            except TakenOverError:
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

    async def settled(self) -> None:
        """Returns when everything that devices have caused is durable."""
        await self._commits.settled()

    async def _resume(self) -> None:
        async with self._commits.still:
            self._go_on()

    def _go_on(self) -> None:
        """Goes on where the coordinator had ended."""
        current = self._state.current()
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
                unfit = group is not None
            else:
                unfit = bool(updates) if group is None else not self._masked.fits(group)
            if unfit:
                reason = "it began with other options of privacy than it was resumed with"
                self._abandon(current, updates, reason)
            elif self._ledger is not None and not (
                self._state.has_spent(current.number) or self._ledger.allows_another()
            ):
                self._abandon(current, updates, "it would exceed the privacy budget")

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
        quality, updates = None, list[Update]()
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
                    return
                aggregated = functools.partial(
                    self._state.aggregate,
                    current.number,
                    generalist,
                    outcome.memory,
                    quality=quality,
                    noise=noise,
                    reach=self._reach(),
                )
                await to_its_end(aggregated)
        except (AggregationError, AdapterError) as error:
            async with self._commits.still:
                if self._is_still(current):  # else its files may have been deleted meanwhile
                    self._give_up(current, updates, error)
            return
        finally:
            self._closing = None
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
        if self._ledger is not None:
            self._report("privacy_spent", {"round": current.number, **self._ledger.described()})
        # A round's files are many; nobody waits for that.
        await asyncio.to_thread(self._state.clean)

    async def _measure(self, gate: QualityGate, current: Round, generalist: bytes) -> Quality:
        try:
            return await gate.compare(self._ends.start_of(current), generalist)
        except ComigsError as error:
            raise AggregationError(f"what came of it could not be measured: {error}") from error

    def _objection(self, quality: Quality | None) -> str | None:
        gate = self._policy.gate
        return None if gate is None or quality is None else gate.objection(quality)

    def _give_up(self, current: Round, updates: list[Update], error: Exception) -> None:
        """What there is to do when a round could not be closed."""
        if isinstance(error, DamagedUpdateError):
            self._drop(current, error)
        elif isinstance(error, AdapterError):
            raise error
        else:
            self._abandon(current, updates, str(error))

    def _drop(self, current: Round, damage: DamagedUpdateError) -> None:
        """Goes on without an accepted update."""
        name = self._state.drop_update(current.number, damage.device, str(damage))
        fields = {"round": current.number, "device": name, "reason": str(damage)}
        self._report("update_damaged", fields)

    def _check_start(self, current: Round) -> None:
        """Looks now and then whether the generalist is what was stored, raising as `_read_start`:
        from a damaged one no download would ever succeed."""
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

    # What the administrator commands; durable on return

    async def pause(self) -> None:
        """Keeps rounds from beginning and from ending, and devices from being sent to train."""
        async with self._commits.still:
            if not self._state.current().paused:
                self._state.pause()
                self._report("paused", {})

    async def resume(self) -> None:
        """Ends a pause."""
        async with self._commits.still:
            if self._state.current().paused:
                self._state.unpause(deadline=self._start_clock())
                if self._masked is not None:
                    self._masked.start_clock()
                self._report("resumed", {})
                self._wake()

    async def abort(self, reason: str, command: str) -> int:
        """Abandons the open round and drops its updates; its number.

        Args:
            command: the same id for the same command, which is carried out once.

        Raises:
            RefusedCommandError: no round is open.
        """
        async with self._commits.still:
            return self._abort(reason, command)

    def _abort(self, reason: str, command: str) -> int:
        if (made := self._state.commanded(command)) is not None:
            return made.number - 1
        current = self._state.current()
        if current.status != Status.OPEN:
            raise RefusedCommandError("no round is open, so there is none to abort")
        words = "aborted by the administrator"
        updates = self._state.updates(current.number)
        reason = f"{words}: {reason}" if reason else words
        self._abandon(current, updates, reason, command=command)
        self._wake()
        return current.number

    async def roll_back(self, number: int, command: str) -> int:
        """Goes back to the generalist that round `number` started from.

        Args:
            command: as in `abort`.

        Returns:
            The round that starts from it.

        Raises:
            RefusedCommandError: there is no such round, it is the current one, or its generalist
                is missing or damaged.
        """
        async with self._commits.still:
            return self._roll_back(number, command)

    def _roll_back(self, number: int, command: str) -> int:
        if (made := self._state.commanded(command)) is not None:
            return made.number
        current, wanted = self._state.current(), self._state.round(number)
        if wanted is None:
            raise NoSuchRoundError(
                f"there is no round {number} to roll back; the last one is {current.number}"
            )
        if number == current.number:
            raise RefusedCommandError(
                f"round {number} is the current one: nothing came of it that could be undone"
            )
        try:
            self._ends.read_start(wanted)
        except AdapterError as error:
            raise RefusedCommandError(
                f"the generalist that round {number} started from is missing or damaged; choose "
                "another round, or restore the state directory from a copy"
            ) from error
        updates = self._state.updates(current.number)
        reason = f"rolled back to the start of round {number} by the administrator"
        self._state.roll_back(number, reason, command=command)
        if current.status == Status.OPEN:
            self._report_abandoned(current, updates, reason)
        self._report("rolled_back", {"round": current.number + 1, "to": number})
        self._wake()
        return current.number + 1

    def _wake(self) -> None:
        """Has everybody who waits look again."""
        self._nudged.set()
        self._notify()

    # What devices ask

    async def check_in(self, device: str, wait_seconds: float) -> pb.CheckInReply:
        """What `device` is to do; held back while that is WAIT, for `wait_seconds` at most."""
        # In this order a NaN becomes 0.
        end = time.monotonic() + min(max(0.0, wait_seconds), MAX_WAIT_SECONDS)
        try:
            while True:
                self._heard[device] = time.monotonic()
                changed = self._changed
                self._nudged.set()
                reply = self._answer(device) or await self._join(device)
                left = end - time.monotonic()
                if reply.action != pb.CheckInReply.WAIT or left <= 0 or self._stopping:
                    break
                await _wait(changed, left)
                async with self._waking:  # one by one, and whoever comes anew in between
                    pass
        except asyncio.CancelledError:
            # The device hung up: it is not waiting any more.
            self._heard.pop(device, None)
            raise
        if reply.action == pb.CheckInReply.WAIT:
            self._heard[device] = time.monotonic()
        else:
            self._heard.pop(device, None)
        answer = pb.CheckInReply(history=self._history)
        answer.MergeFrom(reply)
        return answer

    async def _join(self, device: str) -> pb.CheckInReply:
        """What to answer a device that is to become a participant first."""

        def join(_: list[Change]) -> Change | None:
            if self._answer(device) is not None:  # the round has ended
                return None
            return Participant(round=self._state.current().number, device=device)

        await self._commits.make(device, join)
        return self._answer(device) or WAIT

    async def check_update(self, device: Device, header: pb.UploadHeader) -> bool:
        """Whether an update with this header could count now; False if it does already.

        Raises:
            RefusedUpdateError: it could not.
            TryAgainError: that will be known when the round is closed.
        """
        if self._accepted(device.id, header) is not None:
            return False
        self._place(device.id, header)
        return True

    def _accepted(self, device: str, header: pb.UploadHeader) -> Update | None:
        """The accepted update if this is that one, sent again; raises as `check_update`."""
        accepted = self._state.update(header.round, device)
        if accepted is not None and accepted.sha256 != header.sha256:
            raise RefusedUpdateError(
                f"another update of this device was already accepted in round {header.round}",
                Reason.ANOTHER,
            )
        return accepted

    def _place(self, device: str, header: pb.UploadHeader, beside: Sequence[Change] = ()) -> int:
        """The round in which an update with this header would count; raises as `check_update`.

        Args:
            beside: what is committed together with it.
        """
        if header.history not in ("", self._history):
            raise RefusedUpdateError(
                f"round {header.round} was forgotten when the coordinator was restored from a "
                "backup",
                Reason.LATE,
            )
        current = self._state.current()
        if self._policy.buffering is not None:
            return self._place_in_buffer(self._policy.buffering, current, device, header, beside)
        if header.round == self._closing:
            # Not refused: paused now, the round goes on, and its device should still be in it.
            raise TryAgainError(f"round {header.round} is being closed")
        if header.round < current.number:
            raise RefusedUpdateError(f"round {header.round} is over", Reason.LATE)
        if header.round > current.number or current.status != Status.OPEN:
            raise RefusedUpdateError(f"round {header.round} has not begun", Reason.EARLY)
        if not self._state.standing(header.round, device).participates:
            raise RefusedUpdateError(
                f"this device takes no part in round {header.round}", Reason.NO_PART
            )
        if self._masked is not None:
            problem = self._masked.check_upload(device, header.round, header.total_bytes)
            if problem is not None:
                raise RefusedUpdateError(problem, Reason.MASKING)
        elif self._is_full(header.round, beside):
            raise RefusedUpdateError(
                f"round {header.round} has all the updates that it wanted", Reason.FULL
            )
        return header.round

    def _place_in_buffer(
        self,
        buffering: Buffering,
        current: Round,
        device: str,
        header: pb.UploadHeader,
        beside: Sequence[Change],
    ) -> int:
        """Likewise, in asynchronous rounds: the first one with room."""
        if header.round > current.number:
            raise RefusedUpdateError(f"round {header.round} has not begun", Reason.EARLY)
        number = current.number
        while self._count(number, beside) >= buffering.size:
            number += 1
        if current.done + number - current.number >= self._policy.rounds:
            raise RefusedUpdateError("all rounds have the updates that they wanted", Reason.FULL)
        behind = number - header.round
        if header.round < current.oldest or behind > buffering.max_staleness:
            raise RefusedUpdateError(
                f"it started from the generalist of round {header.round}, which is too long ago: "
                f"{buffering.max_staleness} rounds at most, and none before a roll-back",
                Reason.STALE,
            )
        if not self._state.standing(header.round, device).participates:
            raise RefusedUpdateError(
                f"this device takes no part in round {header.round}", Reason.NO_PART
            )
        if self._state.counts(number, device):
            raise RefusedUpdateError(
                f"another update of this device counts in round {number} already", Reason.ANOTHER
            )
        return number

    async def accept(self, device: Device, header: pb.UploadHeader, file: str) -> None:
        """Counts a checked update whose payload is on disk as `file`; durable on return.

        Raises:
            RefusedUpdateError: it came too late, or another one came first.
            TryAgainError: as `check_update`.
        """

        def count(beside: list[Change]) -> Change | None:
            if self._accepted(device.id, header) is not None:
                return None
            return Update(
                round=header.round,
                device=device.id,
                counted=self._place(device.id, header, beside),
                file=file,
                sha256=header.sha256,
                tokens=header.tokens,
                contract_sha256=device.contract_sha256,
            )

        made = await self._commits.make(device.id, count)
        if not isinstance(made, Update):
            return
        self._report(
            "update_accepted",
            {
                "round": made.counted,
                "device": device.name,
                "bytes": header.total_bytes,
                "behind": made.counted - header.round,
            },
        )
        self._nudged.set()

    async def aggregate(self, device: Device, request: pb.AggregateRequest) -> pb.AggregateReply:
        """A step of `device` in secure aggregation; held back while the reply is to wait.

        Raises:
            RefusedStepError: the step is not what was asked for; the round goes on without it.
        """
        assert self._masked is not None, "the service refuses it otherwise"
        end = time.monotonic() + min(max(0.0, request.wait_seconds), MAX_WAIT_SECONDS)
        masked, full = self._masked, False

        def note(beside: list[Change]) -> Change | None:
            nonlocal full
            if not self._takes_part(device.id, request.round):
                return None
            step = masked.step(device, request)
            full = step is not None and step.first and self._is_full(request.round, beside)
            return None if full else step

        if request.WhichOneof("step") is not None:
            await self._commits.make(device.id, note)
            if full:
                return over(f"round {request.round} has all the updates that it wanted")
            self._nudged.set()
        while True:
            changed = self._changed
            if not self._takes_part(device.id, request.round):
                return over()
            reply = self._masked.answer(device.id, request)
            left = end - time.monotonic()
            if not reply.HasField("wait") or left <= 0 or self._stopping:
                return reply
            await _wait(changed, left)

    async def refuse(self, device: Device, number: int, error: RefusedUpdateError) -> None:
        """Records a refused update; the round goes on without it."""
        refusal = Refusal(round=number, device=device.id, reason=str(error), time=time.time())
        await self._commits.make(device.id, lambda _: refusal)
        self._report(
            "update_refused",
            {
                "round": number,
                "device": device.name,
                "reason": str(error),
                "kind": error.reason,
                "certificate": device.enrolment,
            },
        )
        self._nudged.set()

    def leave(self, device: str) -> None:
        """`device` was revoked or replaced: it is not present. What it reported still counts."""
        self._heard.pop(device, None)
        self._nudged.set()

    async def delivered(self, device: str, number: int) -> None:
        """`device` has stored the generalist of round `number`."""
        current = self._state.current()
        if self._is_over(current) and number == current.number:
            await self._commits.make(device, lambda _: Delivery(number, device))
            self._nudged.set()

    # The inside

    def _answer(self, device: str) -> pb.CheckInReply | None:
        """None: it is to train, and to become a participant first."""
        current = self._state.current()
        if self._is_over(current):
            return pb.CheckInReply(action=pb.CheckInReply.FINISH, round=current.number)
        left = self._seconds_left(current)
        has_time = left or self._policy.buffering is not None
        if current.status != Status.OPEN or current.paused or not has_time:
            return WAIT
        standing = self._state.standing(current.number, device)
        if not self._is_wanted(standing, current.number):
            return WAIT
        if self._policy.buffering is not None and self._state.counts(current.number, device):
            return WAIT
        if not standing.participates:
            return None
        return pb.CheckInReply(
            action=pb.CheckInReply.TRAIN,
            round=current.number,
            retry_seconds=RETRY_SECONDS,
            training=self._policy.training,
            seconds_left=left or 0,
            secure_aggregation=self._masked is not None,
            compressions=self._policy.compressions,
        )

    def _takes_part(self, device: str, number: int) -> bool:
        """Whether the round is open, not being closed, and `device` is one of its participants."""
        current = self._state.current()
        return (
            number == current.number != self._closing
            and current.status == Status.OPEN
            and self._state.standing(number, device).participates
        )

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

    def _is_wanted(self, standing: Standing, number: int) -> bool:
        """Whether an update of a device could still count in the open round."""
        if number == self._closing or self._is_full(number):
            return False
        if self._policy.selection and not standing.participates:
            return False
        if self._state.masking_group(number) is not None:
            return False
        return standing.sha256 is None and not standing.refused

    def _count(self, number: int, beside: Sequence[Change] = ()) -> int:
        """How many updates count in the round, with those in `beside`."""
        more = sum(isinstance(row, Update) and row.counted == number for row in beside)
        return self._state.count_updates(number) + more

    def _is_full(self, number: int, beside: Sequence[Change] = ()) -> bool:
        """Whether the round has as many updates as it wants."""
        if self._policy.buffering is not None:
            return self._count(number, beside) >= self._policy.buffering.size
        selection = self._policy.selection
        if selection is None:
            return False
        if self._masked is not None:
            more = sum(isinstance(row, MaskingStep) and row.first for row in beside)
            return self._state.count_masking(number) + more >= selection.wanted
        return self._count(number, beside) >= selection.wanted

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

    def _reach(self) -> int:
        """From how many earlier rounds updates may count in one."""
        return 0 if self._policy.buffering is None else self._policy.buffering.max_staleness

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
        await _wait(self._nudged, seconds)
        await asyncio.sleep(max(0.0, self._looked + LOOK_SECONDS - time.monotonic()))
        self._looked = time.monotonic()


def _perplexities(quality: Quality | None) -> dict[str, Any]:
    """An event's fields about what the quality gate measured; none without it."""
    return {} if quality is None else {"perplexity": vars(quality)}


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    """Returns when `event` is set or after `seconds` (None: never)."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
