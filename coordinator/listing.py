"""What a coordinator's state says about its rounds, read beside a running one."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, NullPool, Select, create_engine, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from coordinator.database import damaged, is_damage, postgres_engine, read_only
from coordinator.state import DATABASE
from coordinator.tables import SCHEMA, Participant, Refusal, Round, Settings, Status, Update
from edge_runtime.errors import StorageError, VersionError


@dataclass(frozen=True)
class Row:
    """One round."""

    cohort: str
    round: int
    status: str
    participants: int
    accepted: int
    """Updates; `refused` likewise."""
    refused: int
    seconds: float | None
    """From its opening to its end, or until now; None before it has begun."""
    aggregation: str | None
    """The recipe of its aggregation; None before it has begun."""
    paused: bool
    rolled_back_to: int | None
    """Round whose start it repeats; None if it starts from what the previous one came to."""
    reason: str | None
    """Why it was abandoned; None if it was not."""
    incoming_perplexity: float | None
    """On the quality gate's text, of what it started from; None without a gate."""
    candidate_perplexity: float | None
    """Likewise, of what came of it."""
    clipped: int
    """Steps that were longer than --clip-norm."""
    clipped_coordinates: int
    """Of masked steps, beyond the range of their whole numbers."""


def rounds(state: Path, url: str | None = None) -> list[Row]:
    """All rounds in the state directory `state`, by cohort, in order; raises as `reading` does."""
    with reading(state, url) as session:
        chosen = session.execute(select(Settings.cohort, Settings.rounds))
        wanted = {cohort: rounds for cohort, rounds in chosen}
        return [
            _row(found, participants, accepted, refused)
            for found, participants, accepted, refused in session.execute(_counted())
            # After the last round another one waits that will not be.
            if found.status != Status.WAITING or found.done < wanted[found.cohort]
        ]


@contextlib.contextmanager
def reading(state: Path, url: str | None = None) -> Iterator[Session]:
    """The database in the state directory `state`, to read. Writes nothing and waits for nobody.

    Args:
        url: of the PostgreSQL database with the rows, if there is one.

    Raises:
        ValueError: there is no coordinator's state.
        VersionError: another version of comigs made it.
        DamagedDatabaseError: it is damaged.
        StorageError: it cannot be read.
    """
    if url is None:
        engine, place = _sqlite(state), str(state / DATABASE)
    else:
        engine = postgres_engine(url)
        place = engine.url.render_as_string(hide_password=True)
    try:
        with Session(engine) as session:
            mark = "pragma user_version" if url is None else "select schema from lead"
            # 0 or none: it is only just made.
            if (session.scalar(text(mark)) or SCHEMA) != SCHEMA:
                raise VersionError(
                    f"{place} was made by another version of comigs; look at it with that one"
                )
            yield session
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        if is_damage(error.orig):
            raise damaged(place, reason) from error
        raise StorageError(
            f"cannot read {place}: {reason}; check that it is there, whole, and a coordinator's"
        ) from error
    finally:
        engine.dispose()


def _sqlite(state: Path) -> Engine:
    database = state / DATABASE
    if not database.exists():
        raise ValueError(
            f"{state} holds no state of a coordinator; give what `comigs serve` has, --database "
            "too if it has one"
        )
    # Its own connections: SQLAlchemy's URLs cannot say "read only" for every path.
    uri = read_only(database)
    return create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(uri, uri=True), poolclass=NullPool
    )


def _counted() -> Select[Round, int, int, int]:
    """Every round, with its participants, accepted and refused updates: one consistent look."""
    counts = [
        select(func.count())
        .where(table.cohort == Round.cohort, of == Round.number)
        .scalar_subquery()
        for table, of in (
            (Participant, Participant.round),
            (Update, Update.counted),
            (Refusal, Refusal.round),
        )
    ]
    return select(Round, *counts).order_by(Round.cohort, Round.number)


def _row(found: Round, participants: int, accepted: int, refused: int) -> Row:
    seconds = None
    if found.opened_at is not None:
        seconds = round(max(0.0, (found.closed_at or time.time()) - found.opened_at), 3)
    return Row(
        cohort=found.cohort,
        round=found.number,
        status=found.status,
        participants=participants,
        accepted=accepted,
        refused=refused,
        seconds=seconds,
        aggregation=found.recipe,
        paused=found.paused and found.closed_at is None,
        rolled_back_to=found.rolled_back_to,
        reason=found.reason,
        incoming_perplexity=found.incoming_perplexity,
        candidate_perplexity=found.candidate_perplexity,
        clipped=found.clipped,
        clipped_coordinates=found.clipped_coordinates,
    )


def table(rows: list[Row]) -> list[str]:
    """The rows as lines of text, with a heading."""
    heading = (
        *("cohort", "round", "status", "devices", "accepted", "refused", "seconds"),
        "aggregation",
    )
    cells: list[tuple[Any, ...]] = [heading]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        counts = (row.participants, row.accepted, row.refused)
        cells.append((row.cohort, row.round, row.status, *counts, seconds, _remarks(row)))
    width = max(len(cohort) for cohort, *_ in cells)
    return [
        f"{cohort:<{width}} {n:>5}  {status:<10} {devices:>8} {accepted:>9} {refused:>8} "
        f"{time:>9}  {how}".rstrip()
        for cohort, n, status, devices, accepted, refused, time, how in cells
    ]


def _remarks(row: Row) -> str:
    """How it is aggregated, and what is out of the ordinary."""
    remarks = [row.aggregation or ""]
    if row.clipped:
        remarks.append(f"steps clipped: {row.clipped}")
    if row.clipped_coordinates:
        remarks.append(f"coordinates clipped: {row.clipped_coordinates}")
    if row.rolled_back_to is not None:
        remarks.append(f"from the start of round {row.rolled_back_to}")
    if row.paused:
        remarks.append("paused")
    if row.incoming_perplexity is not None and row.reason is None:
        measured = f"{row.incoming_perplexity:.2f} to {row.candidate_perplexity:.2f}"
        remarks.append(f"perplexity {measured}")
    remarks.append(row.reason or "")
    return "; ".join(remark for remark in remarks if remark)
