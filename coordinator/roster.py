"""The layer of State that knows devices: who was invited, has enrolled, and is revoked."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterable

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from coordinator.queries import QUERIES
from coordinator.store import Store
from coordinator.tables import Device, Invitation


class Roster(Store):
    """Devices and invitations, of all cohorts unless it is said otherwise."""

    def invite(
        self, name: str, token: bytes, expires_at: float, *, cohort: str | None = None
    ) -> None:
        """Lets one device enrol as `name`; an earlier invitation for it is forgotten.

        Only a hash of `token` is kept.
        """
        with self._transaction() as session:
            session.execute(delete(Invitation).where(Invitation.name == name))
            digest = hashlib.sha256(token).digest()
            session.add(
                Invitation(name=name, token_sha256=digest, expires_at=expires_at, cohort=cohort)
            )

    def invitation(self, token: bytes) -> Invitation | None:
        digest = hashlib.sha256(token).digest()
        with self._transaction() as session:
            return session.scalar(select(Invitation).where(Invitation.token_sha256 == digest))

    def enrol(
        self,
        name: str,
        *,
        cohort: str,
        contract_sha256: str,
        enrolment: str,
        key_sha256: bytes,
        valid_until: float,
        tier: str | None,
    ) -> Device:
        """Notes that the holder of a key used the invitation for `name`.

        It becomes the device of that name, in the place of an earlier one, revoked or not.
        """
        with self._transaction() as session:
            invitation = session.get_one(Invitation, name)
            invitation.key_sha256, invitation.enrolment = key_sha256, enrolment
            device = _named(session, name)
            device.cohort, device.contract_sha256 = cohort, contract_sha256
            device.enrolment = enrolment
            device.enrolled_at = time.time()
            device.valid_until = valid_until
            device.revoked_at = None
            device.tier = tier
            device.stored_round = 0
            return device

    def extend(self, enrolment: str, valid_until: float) -> None:
        """Notes that the device of that enrolment has a certificate until then."""
        with self._transaction() as session:
            enrolled = select(Device).where(Device.enrolment == enrolment)
            session.scalars(enrolled).one().valid_until = valid_until

    def disinvite(self, name: str) -> bool:
        """Forgets the invitation for `name`. Returns whether there was one."""
        with self._transaction() as session:
            invitation = session.get(Invitation, name)
            if invitation is not None:
                session.delete(invitation)
            return invitation is not None

    def revoke(self, name: str) -> Device | None:
        """Accepts no certificate of the device of that name any more.

        Returns:
            The device, which may have been revoked before; None if there is none.
        """
        with self._transaction() as session:
            device = session.scalar(select(Device).where(Device.name == name))
            if device is not None and device.revoked_at is None:
                device.enrolment = None
                device.revoked_at = time.time()
            return device

    def enrolled(self, enrolment: str) -> Device | None:
        """The device whose certificates carry `enrolment` now."""
        return self._entity(Device, QUERIES.enrolled, enrolment=enrolment)

    def enrolments(self) -> set[str]:
        """Those whose certificates are accepted."""
        with self._transaction() as session:
            chosen = select(Device.enrolment).where(Device.enrolment.is_not(None))
            return {enrolment for enrolment in session.scalars(chosen) if enrolment}

    def named(self, name: str, *, cohort: str, contract_sha256: str) -> Device:
        """The device of that name, made if there is none: for those who need not enrol."""
        with self._transaction() as session:
            device = _named(session, name)
            device.cohort, device.contract_sha256 = cohort, contract_sha256
            return device

    def devices(self) -> list[Device]:
        """All devices, revoked ones too, by name."""
        with self._transaction() as session:
            return list(session.scalars(select(Device).order_by(Device.name)))

    def revoked(self) -> set[str]:
        """Ids of the devices that are revoked, or enrolled again in another cohort."""
        gone = Device.revoked_at.is_not(None) | (Device.cohort != self.cohort)
        with self._transaction() as session:
            return set(session.scalars(select(Device.id).where(gone)))

    def names(self, devices: Iterable[str]) -> dict[str, str]:
        """Name -> id of those of `devices` that are known."""
        with self._transaction() as session:
            chosen = select(Device.name, Device.id).where(Device.id.in_(list(devices)))
            return {name: device for name, device in session.execute(chosen)}

    def delivered(self, number: int) -> set[str]:
        """Ids of the devices that have stored the final generalist, that of round `number`."""
        with self._transaction() as session:
            return set(session.scalars(select(Device.id).where(Device.stored_round == number)))


def _named(session: Session, name: str) -> Device:
    device = session.scalar(select(Device).where(Device.name == name))
    if device is None:
        now = time.time()
        device = Device(
            id=secrets.token_hex(16),
            name=name,
            cohort="",
            contract_sha256="",
            enrolled_at=now,
            valid_until=now,
        )
        session.add(device)
    return device
