"""What the dashboard shows: rounds from the state, and what is going on now. It names no device."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from coordinator import listing, models
from coordinator.calls import Calls
from coordinator.tables import Device, Participant, Refusal, Round, Settings, Update
from edge_runtime.connection import Traffic

MOST_ROUNDS = 60
# How often traffic is looked at, and how many times are remembered: half an hour.
SAMPLE_SECONDS = 5.0
MOST_SAMPLES = 360
# However many look at the page, the state is read no more often than this.
FRESH_SECONDS = 1.0
UNKNOWN_TIER = "unknown"
MOST_TIERS = 12
OTHER_TIERS = "other"


@dataclass
class Live:
    """What others count as it happens."""

    calls: Calls
    traffic: Traffic
    connected: Callable[[], set[str]] = field(default=set)
    """Ids of the devices that are connected."""
    started: float = field(default_factory=time.time)
    """Seconds since the epoch."""


class Overview:
    """Call it for all there is to show, as JSON values; any thread may."""

    def __init__(self, state: Path, live: Live, url: str | None = None) -> None:
        """`url` is of the PostgreSQL database with the rows, if there is one."""
        self._state = state
        self._url = url
        self._live = live
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=MOST_SAMPLES)
        self._lock = threading.Lock()
        self._made = 0.0
        self._kept: dict[str, Any] = {}
        self._privacy: dict[str, dict[str, float | None]] = {}
        self._spent: set[str] = set()

    def observe(self, event: str, fields: dict[str, Any]) -> None:
        """Takes the coordinator's events: the last that says what privacy was spent."""
        if event == "budget_spent":
            self._spent.add(fields.get("cohort", ""))
        if "epsilon" in fields:
            spent = {name: fields.get(name) for name in ("epsilon", "delta", "budget")}
            self._privacy[fields.get("cohort", "")] = spent

    async def sample(self) -> None:
        """Remembers the traffic from time to time, until it is cancelled."""
        while True:
            traffic = self._live.traffic
            self._samples.append((round(time.time(), 1), traffic.received, traffic.sent))
            await asyncio.sleep(SAMPLE_SECONDS)

    def __call__(self) -> dict[str, Any]:
        with self._lock:
            if time.monotonic() >= self._made + FRESH_SECONDS:
                self._kept = self._make()
                self._made = time.monotonic()
            return self._kept

    def _make(self) -> dict[str, Any]:
        traffic = self._live.traffic
        return {
            "time": time.time(),
            "started": self._live.started,
            "cohorts": self._cohorts(),
            "tiers": self._tiers(),
            "traffic": {
                "received": traffic.received,
                "sent": traffic.sent,
                "samples": list(self._samples),
            },
            "open_calls": sum(self._live.calls.open.values()),
        }

    def _cohorts(self) -> list[dict[str, Any]]:
        with listing.reading(self._state, self._url) as session:
            return [
                {
                    "name": setting.cohort,
                    "rounds_wanted": setting.rounds,
                    # That a round begins with.
                    "min_devices": 1 if setting.asynchronous else setting.min_devices,
                    "ended": _ended(session, setting.cohort),
                    # Of privacy: no round begins any more.
                    "budget_spent": setting.cohort in self._spent,
                    "privacy": self._privacy.get(setting.cohort, self._privacy.get("")),
                    "rounds": _rounds(session, setting.cohort),
                    "generalists": [
                        vars(generalist)
                        for generalist in models.of_cohort(
                            session, self._state, setting.cohort, MOST_ROUNDS
                        )
                    ],
                }
                for setting in session.scalars(select(Settings).order_by(Settings.cohort))
            ]

    def _tiers(self) -> list[dict[str, Any]]:
        """How many devices of each tier may take part, and are connected; the largest first."""
        with listing.reading(self._state, self._url) as session:
            found = session.execute(
                select(Device.id, Device.tier).where(Device.revoked_at.is_(None))
            )
            tiers = {device: tier or UNKNOWN_TIER for device, tier in found}
        # Devices say their tier themselves: one of many names must not fill the page.
        most = {tier for tier, _ in Counter(tiers.values()).most_common(MOST_TIERS)}
        named = {device: tier if tier in most else OTHER_TIERS for device, tier in tiers.items()}
        connected = Counter(named[device] for device in self._live.connected() if device in named)
        return [
            {"tier": tier, "enrolled": count, "connected": connected[tier]}
            for tier, count in Counter(named.values()).most_common()
        ]


def _ended(session: Session, cohort: str) -> dict[str, int]:
    """Status -> how many of all rounds ended with it."""
    counted = select(Round.status, func.count()).where(
        Round.cohort == cohort, Round.closed_at.is_not(None)
    )
    return {status: count for status, count in session.execute(counted.group_by(Round.status))}


def _rounds(session: Session, cohort: str) -> list[dict[str, Any]]:
    """The last ones, in order, with what came of their devices."""
    this = (Participant.cohort == Round.cohort, Participant.round == Round.number)
    update = exists().where(
        Update.cohort == Participant.cohort,
        Update.round == Participant.round,
        Update.device == Participant.device,
    )
    participants, without, silent = (
        select(func.count()).where(*this, *more).correlate(Round).scalar_subquery()
        for more in ((), (~update, Participant.refused), (~update, ~Participant.refused))
    )
    accepted = (
        select(func.count())
        .where(Update.cohort == Round.cohort, Update.counted == Round.number)
        .scalar_subquery()
    )
    refusals = (
        select(func.count())
        .where(Refusal.cohort == Round.cohort, Refusal.round == Round.number)
        .scalar_subquery()
    )
    counts = (participants, accepted, without, silent, refusals)
    chosen = select(Round, *counts).where(Round.cohort == cohort)
    rows = session.execute(chosen.order_by(Round.number.desc()).limit(MOST_ROUNDS)).all()
    oldest = rows[0][0].oldest if rows else 0  # the last round is the current one
    return [_row(*row, oldest=oldest) for row in reversed(rows)]


def _row(
    found: Round,
    participants: int,
    accepted: int,
    without: int,
    silent: int,
    refusals: int,
    *,
    oldest: int,
) -> dict[str, Any]:
    """
    Args:
        oldest: the earliest round whose participants may still report.
    """
    if found.closed_at is not None and found.number >= oldest:
        silent = 0  # rounds are asynchronous: nobody has dropped out yet
    seconds = None
    if found.opened_at is not None:
        seconds = max(0.0, (found.closed_at or time.time()) - found.opened_at)
    return {
        "round": found.number,
        "status": found.status,
        "opened_at": found.opened_at,
        "closed_at": found.closed_at,
        "deadline": found.deadline,
        "seconds": seconds,
        "aggregation": found.recipe,
        "paused": found.paused and found.closed_at is None,
        "rolled_back_to": found.rolled_back_to,
        "reason": found.reason,
        "perplexity": found.candidate_perplexity,  # of what came of it, by the quality gate
        "clipped": found.clipped,  # steps; coordinates are of masked steps
        "clipped_coordinates": found.clipped_coordinates,
        "done": found.done,  # rounds that went into the generalist that it starts from
        "participants": participants,
        "accepted": accepted,
        "without": without,  # all that they sent was refused
        "silent": silent,
        "refusals": refusals,
    }
