"""What `comigs serve` was asked for."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from coordinator.limits import Limits
from coordinator.policy import Policy


@dataclass(frozen=True)
class Options:
    """What `comigs serve` was asked for."""

    bundles: tuple[Path, ...]
    cohorts: tuple[str, ...]
    """Names of further cohorts of these bundles."""
    listen: str
    """HOST:PORT; port 0 takes a free one."""
    enrolment_port: int | None
    """Where invitations are used; None: the port after `listen`'s, or a free one if that is 0."""
    state: Path
    database: str | None
    """URL of a PostgreSQL database for the rows; None: SQLite, in `state`."""
    policy: Policy
    names: tuple[str, ...]
    """Further host names and IP addresses for the certificate; devices are told the first."""
    certificate_lifetime: datetime.timedelta
    """Of the certificates that devices get."""
    limits: Limits
    insecure: bool
    exit_when_done: bool
    monitor: str | None = None
    """HOST:PORT of metrics and dashboard; None: neither."""
    traces: str | None = None
    """URL of an OpenTelemetry collector; None: no traces."""
    keep_generalists: int | None = None
    """How many of each cohort; None: all."""
