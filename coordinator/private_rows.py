"""The layer of State with what is spent of privacy, and what secure aggregation has to remember."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session

from coordinator.queries import QUERIES
from coordinator.roster import Roster
from coordinator.tables import (
    Device,
    MaskingGroup,
    MaskingMember,
    MaskingStage,
    MaskingStanding,
    MaskingStep,
    Participant,
    PrivacySpend,
    Round,
    Status,
)


class PrivateRows(Roster):
    """Of rounds with differential privacy, and with secure aggregation."""

    # Differential privacy

    def privacy_spent(self) -> dict[float, int]:
        """Noise multiplier -> how many rounds were told of that had it."""
        counted = select(PrivacySpend.noise_multiplier, func.count()).where(
            PrivacySpend.cohort == self.cohort, PrivacySpend.noise_multiplier > 0
        )
        with self._transaction() as session:
            rows = session.execute(counted.group_by(PrivacySpend.noise_multiplier))
            return {multiplier: count for multiplier, count in rows}

    def has_spent(self, number: int) -> bool:
        """Whether the round is paid for."""
        with self._transaction() as session:
            return session.get(PrivacySpend, (self.cohort, number)) is not None

    def told_without_noise(self) -> bool:
        """Whether something was told of a round without differential privacy."""
        unmasked = select(PrivacySpend.round).where(
            PrivacySpend.cohort == self.cohort, PrivacySpend.noise_multiplier == 0
        )
        spent = select(PrivacySpend.round).where(PrivacySpend.cohort == self.cohort)
        plain = select(Round.number).where(
            Round.cohort == self.cohort,
            # The quality gate tells of those that it turned down.
            (Round.status == Status.AGGREGATED) | Round.candidate_perplexity.is_not(None),
            Round.number.not_in(spent),
        )
        with self._transaction() as session:
            found = [session.scalar(rounds.limit(1)) for rounds in (plain, unmasked)]
        return any(number is not None for number in found)

    # Secure aggregation

    def unreliable(self, number: int) -> set[str]:
        """Devices that the round does not wait for: revoked, or something of them was refused."""
        refused = select(Participant.device).where(
            self._in(Participant, number), Participant.refused
        )
        with self._transaction() as session:
            return set(session.scalars(refused)) | self.revoked()

    def masking_group(self, number: int) -> MaskingGroup | None:
        """None while the round's group is not settled."""
        return self._entity(MaskingGroup, QUERIES.masking_group, round=number)

    def masking_members(self, number: int) -> list[MaskingMember]:
        """Those who advertised keys, in the order of device ids."""
        with self._transaction() as session:
            chosen = self._masking_members(number).order_by(MaskingMember.device)
            return list(session.scalars(chosen))

    def masking_numbers(self, number: int, *, said: str = "keys") -> dict[str, int | None]:
        """Device -> its number in the group, None before it is settled.

        Args:
            said: which devices: those that sent "keys" or "shares", "agreed", or "revealed" some.
        """
        column = getattr(MaskingMember, said)
        with self._transaction() as session:
            chosen = self._masking_members(number).where(column.is_not(None))
            columns = chosen.with_only_columns(MaskingMember.device, MaskingMember.number)
            return {device: given for device, given in session.execute(columns)}

    def masking_standing(self, number: int, device: str) -> MaskingStanding | None:
        """How a device stands in the round's secure aggregation; None if it advertised no keys."""
        columns = (
            MaskingMember.number,
            MaskingMember.shares.is_not(None),
            MaskingMember.agreed.is_not(None),
            MaskingMember.revealed.is_not(None),
        )
        chosen = self._masking_members(number).where(MaskingMember.device == device)
        with self._transaction() as session:
            row = session.execute(chosen.with_only_columns(*columns)).one_or_none()
        return None if row is None else MaskingStanding(row[0], *map(bool, row[1:]))

    def count_masking(self, number: int, *, said: str = "keys") -> int:
        """How many devices `masking_numbers` would list."""
        column = getattr(MaskingMember, said)
        counted = select(func.count()).where(self._in(MaskingMember, number), column.is_not(None))
        with self._transaction() as session:
            return session.scalar(counted) or 0

    def count_trained(self, number: int) -> int:
        """How many devices have advertised keys and are not revoked."""
        members = self._in(MaskingMember, number), MaskingMember.keys.is_not(None)
        known = Device.id == MaskingMember.device, Device.revoked_at.is_(None)
        with self._transaction() as session:
            return session.scalar(select(func.count()).where(*members, *known)) or 0

    def settle(
        self,
        number: int,
        numbers: Mapping[str, int],
        *,
        degree: int,
        terms: bytes,
        divisor: int | None = None,
    ) -> None:
        """Begins secure aggregation with the devices in `numbers`; forgets others' keys."""
        with self._transaction() as session:
            session.add(
                MaskingGroup(
                    cohort=self.cohort,
                    round=number,
                    stage=MaskingStage.SHARE,
                    degree=degree,
                    terms=terms,
                    divisor=divisor,
                )
            )
            for member in session.scalars(self._masking_members(number)):
                if member.device in numbers:
                    member.number = numbers[member.device]
                else:
                    session.delete(member)

    def set_masking_stage(
        self, number: int, stage: MaskingStage, *, noise: float | None = None
    ) -> None:
        """
        Args:
            noise: its multiplier, 0 without, if something of the sum may be learnt from now on.
        """
        with self._transaction() as session:
            session.get_one(MaskingGroup, (self.cohort, number)).stage = stage
            self._spend(session, number, noise)

    def agreements(self, number: int) -> dict[int, bytes]:
        """Number in the group -> signature."""
        columns = MaskingMember.number, MaskingMember.agreed
        chosen = self._masking_members(number).where(MaskingMember.agreed.is_not(None))
        with self._transaction() as session:
            rows = session.execute(chosen.with_only_columns(*columns))
            return {index: agreed for index, agreed in rows if index and agreed}

    def _note_step(self, session: Session, step: MaskingStep) -> None:
        """Of keys, the latest ones count."""
        whose = {"cohort": self.cohort, "round": step.round, "device": step.device}
        if step.said == "keys":
            session.merge(MaskingMember(**whose, keys=step.content))
        else:
            setattr(session.get_one(MaskingMember, whose), step.said, step.content)

    def _masking_members(self, number: int) -> Select[MaskingMember]:
        return select(MaskingMember).where(self._in(MaskingMember, number))

    def _spend(self, session: Session, number: int, noise: float | None) -> None:
        """Notes what a round costs of the privacy budget; once, however often it is noted."""
        if noise is not None:
            spend = PrivacySpend(cohort=self.cohort, round=number, noise_multiplier=noise)
            session.merge(spend)

    def _forget_masking(self, session: Session, number: int) -> None:
        """Deletes what secure aggregation of a round that is over has left."""
        session.execute(delete(MaskingMember).where(self._in(MaskingMember, number)))
        session.execute(delete(MaskingGroup).where(self._in(MaskingGroup, number)))
