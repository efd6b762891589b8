"""Rounds as devices and the administrator meet them: check-ins and commands.

How rounds go is in `course`, and which updates count in `acceptance`.
"""

from __future__ import annotations

import asyncio
import time

from coordinator.course import MAX_WAIT_SECONDS, Course, wait
from coordinator.policy import NoSuchRoundError, RefusedCommandError
from coordinator.secure_aggregation import over
from coordinator.tables import Change, Delivery, Device, Participant, Status
from edge_runtime.errors import AdapterError
from protos import coordinator_pb2 as pb

RETRY_SECONDS = 1.0
WAIT = pb.CheckInReply(action=pb.CheckInReply.WAIT, retry_seconds=RETRY_SECONDS)


class Rounds(Course):
    """The rounds of a cohort. One event loop, one instance per State."""

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
                f"there is no round {number} to roll back; choose one before {current.number}, the "
                "current one"
            )
        if number == current.number:
            raise RefusedCommandError(
                f"round {number} is the current one: nothing came of it that could be undone"
            )
        with self._state.keeping_starts():
            try:
                self._ends.read_start(wanted)
            except AdapterError as error:
                raise RefusedCommandError(
                    f"the generalist that round {number} started from is missing or damaged; "
                    "choose another round, or restore the state directory from a copy"
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
                await wait(changed, left)
                async with self._waking:  # one by one, and whoever comes anew in between
                    await asyncio.sleep(0)
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

    async def aggregate(self, device: Device, request: pb.AggregateRequest) -> pb.AggregateReply:
        """A step of `device` in secure aggregation; held back while the reply is to wait.

        Raises:
            RefusedStepError: the step is not what was asked for; the round goes on without it.
            AnotherTaskError: the device has to check in, and train again.
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
            await self._commits.make(device.id, note, lambda _: self._nudged.set())
            if full:
                return over(f"round {request.round} has all the updates that it wanted")
        while True:
            changed = self._changed
            if not self._takes_part(device.id, request.round):
                return over()
            reply = self._masked.answer(device.id, request)
            left = end - time.monotonic()
            if not reply.HasField("wait") or left <= 0 or self._stopping:
                return reply
            await wait(changed, left)

    def leave(self, device: str) -> None:
        """`device` was revoked or replaced: it is not present. What it reported still counts."""
        self._heard.pop(device, None)
        self._nudged.set()

    async def delivered(self, device: str, number: int) -> None:
        """`device` has stored the generalist of round `number`."""
        current = self._state.current()
        if self._is_over(current) and number == current.number:
            delivery = Delivery(number, device)
            await self._commits.make(device, lambda _: delivery, lambda _: self._nudged.set())

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
            rounds_done=current.done,
        )
