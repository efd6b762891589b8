"""The generalists that a coordinator has made: when, how large, how far each is from the last."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coordinator import listing
from coordinator.tables import Round


@dataclass(frozen=True)
class Generalist:
    """What one round, and perhaps further ones, start from."""

    cohort: str
    number: int
    """Of the first round that starts from it."""
    made_at: float | None
    """When the round before it ended, in seconds since the epoch; None for the bundle's own."""
    bytes: int | None
    """Size of its file; None if it is not there."""
    step: float | None
    """L2 norm of its difference from what the round that made it started from; None if one of them
    is not there or not readable, or for the bundle's own."""
    sha256: str
    current: bool
    """Whether the present round starts from it."""


def generalists(state: Path, url: str | None = None) -> list[Generalist]:
    """All in the state directory `state`, by cohort, in order; raises as `listing.reading` does."""
    with listing.reading(state, url) as session:
        cohorts = session.scalars(select(Round.cohort).distinct().order_by(Round.cohort)).all()
        return [found for cohort in cohorts for found in of_cohort(session, state, cohort)]


def of_cohort(
    session: Session, state: Path, cohort: str, latest: int | None = None
) -> list[Generalist]:
    """Those of one cohort, in order; only the `latest` ones if that is given."""
    own = Round.cohort == cohort
    number = func.min(Round.number).label("number")
    firsts = select(number).where(own).group_by(Round.generalist_sha256)
    those = firsts.order_by(number.desc()).limit(latest).subquery()
    wanted = select(those.c.number).union(select(those.c.number - 1))  # and what made them
    chosen = select(Round).where(own, Round.number.in_(wanted))
    rounds = {found.number: found for found in session.scalars(chosen)}
    last = select(Round.generalist_sha256).where(own).order_by(Round.number.desc()).limit(1)
    current = session.scalars(last).one()
    return [
        _generalist(state, rounds.get(first - 1), rounds[first], current)
        for first in sorted(session.scalars(select(those.c.number)))
    ]


def _generalist(state: Path, maker: Round | None, found: Round, current: str) -> Generalist:
    """What round `found` is the first to start from, made by round `maker`."""
    path = state / found.generalist_file
    return Generalist(
        cohort=found.cohort,
        number=found.number,
        made_at=None if maker is None else maker.closed_at,
        bytes=path.stat().st_size if path.exists() else None,
        step=None if maker is None else _step(state / maker.generalist_file, path),
        sha256=found.generalist_sha256,
        current=found.generalist_sha256 == current,
    )


def _step(before: Path, after: Path) -> float | None:
    try:
        return _distance(before, after)
    except (OSError, SafetensorError):
        return None


@functools.lru_cache(maxsize=4096)
def _distance(before: Path, after: Path) -> float | None:
    """Files of generalists never change: their names hold their hashes.

    Raises:
        OSError, SafetensorError: one cannot be read, for now.
    """
    old, new = load_file(before), load_file(after)
    if old.keys() != new.keys():
        return None
    # One tensor at a time in float64.
    squares = (float(np.square(new[k].astype(np.float64) - old[k]).sum()) for k in sorted(new))
    return math.sqrt(math.fsum(squares))


def table(rows: list[Generalist]) -> list[str]:
    """The rows as lines of text, with a heading; the current one has a star."""
    cells: list[tuple[Any, ...]] = [("cohort", "round", "made", "bytes", "step", "SHA-256")]
    for row in rows:
        moment = row.made_at and datetime.fromtimestamp(row.made_at).strftime("%Y-%m-%d %H:%M:%S")
        step = "-" if row.step is None else f"{row.step:.4g}"
        size = "-" if row.bytes is None else f"{row.bytes:,}"
        digest = row.sha256[:16] + (" *" if row.current else "")
        cells.append((row.cohort, row.number, moment or "by the bundle", size, step, digest))
    width = max(len(cohort) for cohort, *_ in cells)
    return [
        f"{cohort:<{width}} {number:>5}  {made:<19} {size:>12} {step:>9}  {digest}"
        for cohort, number, made, size, step, digest in cells
    ]
