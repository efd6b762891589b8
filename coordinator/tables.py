"""The tables of the coordinator's database, and what else is said of their rows.

Rounds are numbered within their cohort. A cohort always has exactly one current round, the only one
that is WAITING or OPEN; it knows the generalist that it starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, Index, Integer
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Raised whenever the tables below change; in the database as `user_version`.
SCHEMA = 2


class Status(StrEnum):
    WAITING = "waiting"  # not begun: too few devices are here, or all rounds are over
    OPEN = "open"
    AGGREGATED = "aggregated"
    ABANDONED = "abandoned"  # it changed nothing; `Round.reason` says why


class Base(DeclarativeBase):
    # SQLite's own integers have 64 bits, and only they number rows by themselves.
    type_annotation_map: ClassVar = {int: BigInteger().with_variant(Integer, "sqlite")}


class Device(Base):
    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(primary_key=True)
    """The same for every enrolment under the name, so that no round counts it twice."""
    name: Mapped[str] = mapped_column(unique=True)
    cohort: Mapped[str]
    """In whose rounds it takes part."""
    contract_sha256: Mapped[str]
    """Of the bundle that it has."""
    enrolment: Mapped[str | None] = mapped_column(unique=True)
    """Its certificates carry this; None if none of them is accepted any more."""
    enrolled_at: Mapped[float]
    """Here and below: seconds since the epoch."""
    valid_until: Mapped[float]
    """When its latest certificate lapses."""
    revoked_at: Mapped[float | None]
    tier: Mapped[str | None]
    """Of its bundle, as it said when it enrolled."""
    stored_round: Mapped[int] = mapped_column(default=0)
    """The round whose generalist it said it has stored as the final one; 0 before."""


class Invitation(Base):
    """Lets one device enrol; of a name's invitations only the latest is kept."""

    __tablename__ = "invitations"

    name: Mapped[str] = mapped_column(primary_key=True)
    token_sha256: Mapped[bytes] = mapped_column(unique=True)
    expires_at: Mapped[float]
    cohort: Mapped[str | None]
    """That the device is to be in; None: the one of its bundle."""
    key_sha256: Mapped[bytes | None]
    """Hash of the public key that it was used with; None before."""
    enrolment: Mapped[str | None]
    """Which enrolment that was."""


class Round(Base):
    __tablename__ = "rounds"

    cohort: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """From 1."""
    status: Mapped[str]
    """A Status."""
    opened_at: Mapped[float | None]
    deadline: Mapped[float | None]
    generalist_file: Mapped[str]
    """What the round starts from, as a path below the state directory."""
    generalist_sha256: Mapped[str]
    memory_file: Mapped[str | None]
    """What the server optimizer remembers of earlier rounds, likewise; deleted once the round is
    over."""
    recipe: Mapped[str | None]
    """How it is aggregated, for people; None before it has begun."""
    closed_at: Mapped[float | None]
    reason: Mapped[str | None]
    """Why it was abandoned, for people."""
    done: Mapped[int] = mapped_column(default=0)
    """Aggregated rounds that went into the generalist that it starts from."""
    paused: Mapped[bool] = mapped_column(default=False)
    """By the administrator: it neither begins nor ends."""
    rolled_back_to: Mapped[int | None]
    """Round whose start it repeats, at the administrator's wish."""
    command: Mapped[str | None] = mapped_column(unique=True)
    """Id of the administrator's command that made it the current one."""
    incoming_perplexity: Mapped[float | None]
    """On the quality gate's text; None without one."""
    candidate_perplexity: Mapped[float | None]
    """Likewise, of what came of it."""
    clipped: Mapped[int] = mapped_column(default=0)
    """Steps that were longer than --clip-norm."""
    clipped_coordinates: Mapped[int] = mapped_column(default=0)
    """Of masked steps, beyond the range of their whole numbers."""
    oldest: Mapped[int]
    """The earliest round whose participants' updates may count in it; in synchronous rounds itself.
    Updates are kept from there on."""


def _of_a_round() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["cohort", "round"], [Round.cohort, Round.number])


class Participant(Base):
    __tablename__ = "participants"
    __table_args__ = (_of_a_round(),)

    cohort: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey(Device.id), primary_key=True)
    refused: Mapped[bool] = mapped_column(default=False)
    """Whether an update of it was refused since it joined."""


class Update(Base):
    """An accepted update. The primary key makes it impossible to count a device twice for what it
    started from."""

    __tablename__ = "updates"
    __table_args__ = (_of_a_round(), Index("updates_counted", "cohort", "counted"))

    cohort: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    """That its device took part in, and whose generalist it started from."""
    device: Mapped[str] = mapped_column(ForeignKey(Device.id), primary_key=True)
    counted: Mapped[int]
    """Round that it counts in: the same one, or a later one if rounds are asynchronous."""
    file: Mapped[str]
    """Payload, as a path below the state directory; deleted once the round is over."""
    sha256: Mapped[bytes]
    tokens: Mapped[int]
    contract_sha256: Mapped[str]
    """Of the bundle that it was made with."""


@dataclass(frozen=True)
class Standing:
    """How one device stands in one round."""

    participates: bool
    refused: bool
    """Whether an update of it was refused since it joined."""
    sha256: bytes | None
    """Of its accepted update."""


class Refusal(Base):
    __tablename__ = "refusals"

    id: Mapped[int] = mapped_column(primary_key=True)
    cohort: Mapped[str]
    round: Mapped[int]
    """As the device claimed; there may be no such round."""
    device: Mapped[str] = mapped_column(ForeignKey(Device.id))
    reason: Mapped[str]
    time: Mapped[float]

    __table_args__ = (
        Index("refusals_of_device", "device", "time"),
        Index("refusals_of_round", "cohort", "round"),
    )


@dataclass
class Delivery:
    """A device has stored the final generalist, that of round `round`."""

    round: int
    device: str
    cohort: str = ""


@dataclass
class MaskingStep:
    """What a device says in secure aggregation."""

    round: int
    device: str
    said: str
    """A column of MaskingMember: "keys", "shares", "agreed" or "revealed"."""
    content: bytes
    first: bool = False
    """Whether it has said nothing before, so that it is one more member."""
    cohort: str = ""


Change = Participant | Update | Refusal | Delivery | MaskingStep
"""What a device causes, and `State.commit` takes together with what others cause."""


class PrivacySpend(Base):
    """A round with differential privacy of which something was told, or one without of which the
    sum could be known, whatever became of it. Never deleted."""

    __tablename__ = "privacy_spends"
    __table_args__ = (_of_a_round(),)

    cohort: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    noise_multiplier: Mapped[float]
    """0: without."""


class MaskingStage(StrEnum):
    SHARE = "share"
    MASK = "mask"
    AGREE = "agree"
    UNMASK = "unmask"


class MaskingGroup(Base):
    """Who takes part in a round's secure aggregation, once that is settled."""

    __tablename__ = "masking_groups"
    __table_args__ = (_of_a_round(),)

    cohort: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    stage: Mapped[str]
    """A MaskingStage."""
    degree: Mapped[int]
    """Of the graph of neighbours."""
    terms: Mapped[bytes]
    """What all are told: a MaskingGroup of protos/ without `index` and `neighbours`."""
    divisor: Mapped[int | None]
    """What makes a mean of the sum, with differential privacy; None: how many are summed up."""


class MaskingMember(Base):
    """A device that advertised keys. Deleted once the round is over, like MaskingGroup."""

    __tablename__ = "masking_members"
    __table_args__ = (_of_a_round(),)

    cohort: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey(Device.id), primary_key=True)
    number: Mapped[int | None]
    """In the group; None before it is settled."""
    keys: Mapped[bytes]
    """KeyAdvertisement; below: OutgoingShares, an Agreement's signature, and RevealedShares; None
    before they came."""
    shares: Mapped[bytes | None]
    agreed: Mapped[bytes | None]
    revealed: Mapped[bytes | None]


@dataclass(frozen=True)
class MaskingStanding:
    """How one device stands in a round's secure aggregation."""

    number: int | None
    """In the group; None before it is settled."""
    shared: bool
    agreed: bool
    revealed: bool


class Settings(Base):
    """Of each cohort: the bundle that it belongs to, and how the last start wanted the rounds."""

    __tablename__ = "settings"

    cohort: Mapped[str] = mapped_column(primary_key=True)
    contract_sha256: Mapped[str]
    rounds: Mapped[int]
    min_devices: Mapped[int]
    deadline_seconds: Mapped[float]
    recipe: Mapped[str]
    selection: Mapped[str | None]
    gate: Mapped[str | None]
    asynchronous: Mapped[str | None]
    secure_aggregation: Mapped[str | None]
    privacy: Mapped[str | None]
    compression: Mapped[str | None]
    training: Mapped[str]
    """TrainingConfig in proto3 JSON."""
    history: Mapped[str]
    """Drawn at the beginning, and again when a backup is restored: rounds of another history have
    the same numbers and are not the same."""
