"""What is asked of the database for every call, built once: building a query takes longer than its
answer."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Select, bindparam, func, select
from sqlalchemy.orm import InstrumentedAttribute, aliased

from coordinator.tables import (
    Device,
    MaskingGroup,
    MaskingMember,
    Participant,
    Round,
    Status,
    Update,
)


class Queries:
    """They take `cohort` and, as far as they are about one, `round` and `device`."""

    def __init__(self) -> None:
        devices, rounds, participants, updates, groups = (
            kind.__table__ for kind in (Device, Round, Participant, Update, MaskingGroup)
        )
        device = _given("device")

        def of_round(rows: Any) -> Any:
            return (rows.c.cohort == _given("cohort")) & (rows.c.round == _given("round"))

        counted = (updates.c.cohort == _given("cohort")) & (updates.c.counted == _given("round"))
        joined = select(participants.c.refused).where(
            of_round(participants), participants.c.device == device
        )
        accepted = select(updates).where(of_round(updates), updates.c.device == device)
        self.enrolled = select(devices).where(devices.c.enrolment == _given("enrolment"))
        unfinished = (rounds.c.status == Status.WAITING) | (rounds.c.status == Status.OPEN)
        # The only one, and the last: looked for from the end of what may be a long history.
        self.current = (
            select(rounds)
            .where(rounds.c.cohort == _given("cohort"), unfinished)
            .order_by(rounds.c.number.desc())
            .limit(1)
        )
        self.standing = select(
            joined.scalar_subquery(),
            accepted.with_only_columns(updates.c.sha256).scalar_subquery(),
        )
        self.update = accepted
        self.count = select(func.count()).select_from(updates).where(counted)
        self.counts = select(updates.c.device).where(counted, updates.c.device == device)
        self.masking_group = select(groups).where(of_round(groups))
        kinds: tuple[type[Update | MaskingMember], ...] = (Update, MaskingMember)
        self.missing = {kind: self._missing(kind) for kind in kinds}
        self.not_back = {kind: self._not_back(kind) for kind in kinds}

    def _missing(self, done: type[Update | MaskingMember]) -> Select[Any]:
        """A participant of the round of which there is nothing `done` yet, and should be."""
        joined = aliased(Participant)
        here = (joined.cohort == _given("cohort")) & (joined.round == _given("round"))
        return select(joined.device).where(here, _missed(joined.device, done)).limit(1)

    def _not_back(self, done: type[Update | MaskingMember]) -> Select[Any]:
        """Likewise, a device whose update went into the round before."""
        earlier, before = aliased(Update), _given("round") - 1
        aggregated = select(Round.number).where(
            Round.cohort == _given("cohort"),
            Round.number == before,
            Round.status == Status.AGGREGATED,
        )
        there = (earlier.cohort == _given("cohort")) & (earlier.round == before)
        missed = _missed(earlier.device, done)
        return select(earlier.device).where(there, aggregated.exists(), missed).limit(1)


def _missed(
    device: InstrumentedAttribute[str], done: type[Update | MaskingMember]
) -> ColumnElement[bool]:
    """Whether the round waits for a device: not if it was refused, or is revoked or elsewhere."""
    cohort, number = _given("cohort"), _given("round")
    here = Device.revoked_at.is_(None) & (Device.cohort == cohort)
    reported = select(done.device).where(
        done.cohort == cohort, done.round == number, done.device == device
    )
    refused = select(Participant.device).where(
        Participant.cohort == cohort,
        Participant.round == number,
        Participant.device == device,
        Participant.refused,
    )
    return (
        select(Device.id).where(Device.id == device, here).exists()
        & ~reported.exists()
        & ~refused.exists()
    )


def _given(name: str) -> BindParameter[Any]:
    return bindparam(name)


QUERIES = Queries()
