"""How rounds are run, and how what does not go is said: what is refused, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from coordinator.accounting import Privacy
from coordinator.aggregation import Recipe
from coordinator.buffering import Buffering
from coordinator.quality import QualityGate
from coordinator.secure_aggregation import Masking
from coordinator.selection import Selection
from coordinator.tables import Device
from edge_runtime.errors import brief
from protos import coordinator_pb2 as pb

Report = Callable[[str, dict[str, Any]], None]
"""Takes an event's name and its fields."""


def to_all(*observers: Report) -> Report:
    """A Report that passes each event on to all of `observers`, in their order."""

    def report(event: str, fields: dict[str, Any]) -> None:
        for observer in observers:
            observer(event, fields)

    return report


@dataclass(frozen=True)
class Policy:
    """How rounds are run."""

    rounds: int
    """Aggregated rounds until the end."""
    min_devices: int
    deadline_seconds: float
    recipe: Recipe
    selection: Selection | None
    """None: every device takes part."""
    masking: Masking | None
    """None: updates come as they are."""
    gate: QualityGate | None
    """None: what comes of a round is not looked at."""
    privacy: Privacy | None
    """Differential privacy; None: there is none."""
    buffering: Buffering | None
    """None: rounds are synchronous."""
    training: pb.TrainingConfig
    compressions: tuple[pb.Compression.ValueType, ...] = ()
    """That updates may have, the preferred one first."""


class Reason(StrEnum):
    """Why an update does not count, in few words."""

    MALFORMED = "malformed"
    LATE = "late"
    EARLY = "early"
    ANOTHER = "another"  # of the same device was accepted before
    NO_PART = "no_part"
    FULL = "full"
    STALE = "stale"  # what it started from is too long ago
    MASKING = "masking"  # no masked step of this device was asked for then


class Counting(Protocol):
    """Decides which updates count; `Rounds` says when what is raised."""

    async def check_update(self, device: Device, header: pb.UploadHeader) -> bool: ...

    async def accept(self, device: Device, header: pb.UploadHeader, file: str) -> None: ...

    async def refuse(self, device: Device, number: int, error: RefusedUpdateError) -> None: ...


class RefusedCommandError(Exception):
    """What the administrator wants cannot be done; the message is one line that says why."""


class NoSuchRoundError(RefusedCommandError):
    """There is no round of that number."""


class TryAgainError(Exception):
    """Whether an update counts cannot be told now; the message is one line that says why."""


class RefusedUpdateError(Exception):
    """An update does not count; the message is one line that says why. It is kept and shown, and
    may quote what the device sent."""

    def __init__(self, message: str, reason: Reason = Reason.MALFORMED) -> None:
        super().__init__(brief(message))
        self.reason = reason
