"""Which updates count, and in which round. `course` has the rules of the rounds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from coordinator.buffering import Buffering
from coordinator.commits import Commits
from coordinator.policy import Policy, Reason, RefusedUpdateError, Report, TryAgainError
from coordinator.secure_aggregation import SecureAggregation
from coordinator.state import State
from coordinator.tables import Change, Device, MaskingStep, Refusal, Round, Standing, Status, Update
from edge_runtime.protocol import CLOSING
from protos import coordinator_pb2 as pb


class Acceptance:
    """The layer of Rounds that decides on updates. One event loop."""

    def __init__(
        self, *, state: State, policy: Policy, report: Report, masked: SecureAggregation | None
    ) -> None:
        self._state = state
        self._policy = policy
        self._report = report
        self._masked = masked
        self._history = state.history()
        self._commits: Commits[Change] = Commits(state.commit)
        self._closing: int | None = None
        # Wakes `run`.
        self._nudged = asyncio.Event()

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

        def counted(made: Change) -> None:
            assert isinstance(made, Update)
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

        try:
            await self._commits.make(device.id, count, counted)
        except RefusedUpdateError:
            self._state.drop_file(file)  # nobody else will ask for it
            raise

    async def refuse(self, device: Device, number: int, error: RefusedUpdateError) -> None:
        """Records a refused update; the round goes on without it."""
        await self._note_refusal(
            "update_refused", device, number, str(error), {"kind": error.reason}
        )

    async def refuse_shares(self, device: Device, number: int, reason: str) -> None:
        """Records that shares of masks' secrets that `device` dealt out or revealed are false."""
        await self._note_refusal("shares_refused", device, number, reason)

    async def _note_refusal(
        self,
        event: str,
        device: Device,
        number: int,
        reason: str,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        refusal = Refusal(round=number, device=device.id, reason=reason, time=time.time())
        known = {"device": device.name, "certificate": device.enrolment}

        def noted(_: Change) -> None:
            self._report(event, {"round": number, "reason": reason, **known, **more})
            self._nudged.set()

        await self._commits.make(device.id, lambda _: refusal, noted)

    async def settled(self) -> None:
        """Returns when everything that devices have caused is durable."""
        await self._commits.settled()

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
            raise TryAgainError(f"round {header.round} {CLOSING}")
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
        began = self._state.round(header.round)
        # By generalists: of a round that was abandoned there is none.
        behind = current.done + number - current.number - (0 if began is None else began.done)
        if header.round < current.oldest or behind > buffering.max_staleness:
            raise RefusedUpdateError(
                f"it started from the generalist of round {header.round}, which is too long ago: "
                f"{buffering.max_staleness} generalists at most, and none before a roll-back",
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

    def _takes_part(self, device: str, number: int) -> bool:
        """Whether the round is open and `device` is one of its participants."""
        current = self._state.current()
        return (
            number == current.number
            and current.status == Status.OPEN
            and self._state.standing(number, device).participates
        )

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
            return self._state.count_trained(number) + more >= selection.wanted
        return self._count(number, beside) >= selection.wanted
