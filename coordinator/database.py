"""Where the coordinator's rows are: a SQLite file in the state directory, or PostgreSQL by URL.

One coordinator at a time leads a state, and it alone writes. With PostgreSQL that is made sure of
twice, by a lock in the database for as long as the coordinator's connection lives, and by a term:
each coordinator that takes the state over raises it, and every transaction of an earlier one then
fails.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Boolean,
    Connection,
    Dialect,
    Engine,
    Select,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.orm import Session

from edge_runtime.errors import AdapterError, MissingPartError, StorageError

FILE = "coordinator.sqlite3"
# "comigs", as the number that PostgreSQL wants.
LOCK = int.from_bytes(b"comigs", "big")
CONNECT_SECONDS = 5
# A coordinator whose machine vanished loses its lock within about 25 seconds, and one whose
# database vanished is told within as long, instead of standing still.
KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
KEEPALIVE = " ".join(f"-c tcp_{name}={value}" for name, value in KEEPALIVES.items())
UNANSWERED_MS = 25_000
READ_ONLY = "-c default_transaction_read_only=on"
LOOPBACK = "127.0.0.1"


class TakenOverError(StorageError):
    """Another coordinator goes on with this state."""


class InUseError(StorageError):
    """Another coordinator uses the state."""


class DamagedDatabaseError(StorageError):
    """Its file is not what it was. Waiting does not mend that."""

    code = AdapterError.code


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite says so of its file."""
    codes = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in codes


def damaged(place: object, reason: str) -> DamagedDatabaseError:
    return DamagedDatabaseError(
        f"{place} is damaged: {reason}; restore the state directory from a backup"
    )


class Database(ABC):
    """Of one coordinator, from when it takes the state until it ends."""

    engine: Engine
    place: str
    """What it is, for people."""

    @abstractmethod
    def take(self, check: Callable[[Connection], None] = lambda _: None) -> None:
        """Keeps other coordinators away from now on.

        Args:
            check: raises if this is not the one to lead: whoever leads goes on then.

        Raises:
            InUseError: one is there.
        """

    @abstractmethod
    def is_there(self) -> bool:
        """Whether it can be asked without being made."""

    @abstractmethod
    def schema(self) -> int | None:
        """As `mark` wrote it; None in a new database."""

    @abstractmethod
    def mark(self, schema: int) -> None: ...

    @abstractmethod
    def guard(self, session: Session | Connection) -> None:
        """Begins a transaction: it commits only if this is still the coordinator of the state.

        Raises:
            TakenOverError: it is not.
        """

    @abstractmethod
    def lost(self) -> None:
        """A connection has broken."""

    def ask(self, query: Select[Any], values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """The rows of a query that is built once and asked for every call."""
        with self.engine.begin() as connection:
            self.guard(connection)
            return connection.execute(query, dict(values)).all()

    def close(self) -> None:
        self.engine.dispose()


class Sqlite(Database):
    """The lock of the state directory is enough for it."""

    def __init__(self, directory: Path) -> None:
        self.place = str(directory / FILE)
        self.engine = create_engine(URL.create("sqlite", database=self.place))
        event.listen(self.engine, "connect", _configure)
        self._asked: dict[Select[Any], _Asked] = {}
        # Each thread reads with a connection of its own.
        self._reading = threading.local()
        self._readers: list[sqlite3.Connection] = []

    def ask(self, query: Select[Any], values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Likewise, past SQLAlchemy, which takes ten times as long as SQLite does."""
        asked = self._asked.get(query)
        if asked is None:
            asked = self._asked[query] = _Asked(query, self.engine.dialect)
        try:
            return asked.rows(self._reader(), values)
        except sqlite3.Error as error:
            raise OperationalError(asked.text, None, error) from error

    def _reader(self) -> sqlite3.Connection:
        reader: sqlite3.Connection | None = getattr(self._reading, "connection", None)
        if reader is None:
            reader = sqlite3.connect(self.place, isolation_level=None, check_same_thread=False)
            self._reading.connection = reader
            self._readers.append(reader)
        return reader

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        super().close()

    def take(self, check: Callable[[Connection], None] = lambda _: None) -> None: ...

    def is_there(self) -> bool:
        return Path(self.place).exists()

    def schema(self) -> int | None:
        with self.engine.begin() as connection:
            return connection.exec_driver_sql("PRAGMA user_version").scalar() or None

    def mark(self, schema: int) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA user_version={schema}")

    def guard(self, session: Session | Connection) -> None: ...

    def lost(self) -> None: ...


class _Asked:
    """A query as SQLite takes it."""

    def __init__(self, query: Select[Any], dialect: Dialect) -> None:
        compiled = query.compile(dialect=dialect)
        self.text = str(compiled)
        self._names = list(compiled.positiontup or ())
        self._constants = dict(compiled.params)
        self._truths = [
            index
            for index, column in enumerate(query.selected_columns)
            if isinstance(column.type, Boolean)
        ]

    def rows(
        self, connection: sqlite3.Connection, values: Mapping[str, Any]
    ) -> Sequence[Sequence[Any]]:
        given = {**self._constants, **values}
        rows = connection.execute(self.text, [given[name] for name in self._names]).fetchall()
        return [self._read(row) for row in rows] if self._truths else rows

    def _read(self, row: tuple[Any, ...]) -> list[Any]:
        """SQLite has no truth values."""
        read = list(row)
        for index in self._truths:
            read[index] = None if row[index] is None else bool(row[index])
        return read


class Postgres(Database):
    def __init__(self, url: str, options: str = "") -> None:
        """
        Args:
            options: see `postgres_engine`, which this raises as.
        """
        self.engine = postgres_engine(url, options)
        self.place = self.engine.url.render_as_string(hide_password=True)
        self._holder: Connection | None = None
        self._doubtful = False
        self._term = 0

    def take(self, check: Callable[[Connection], None] = lambda _: None) -> None:
        self._hold()
        with self.engine.begin() as connection:
            check(connection)
            connection.execute(
                text(
                    "create table if not exists lead "
                    "(id int primary key, term bigint not null, schema int, address text)"
                )
            )
            self._term = connection.execute(
                text(
                    "insert into lead values (1, 1) "
                    "on conflict (id) do update set term = lead.term + 1, address = null "
                    "returning term"
                )
            ).scalar_one()

    def is_there(self) -> bool:
        return True

    def schema(self) -> int | None:
        with self.engine.begin() as connection:
            schema: int | None = connection.execute(text("select schema from lead")).scalar_one()
            return schema

    def mark(self, schema: int) -> None:
        with self.engine.begin() as connection:
            connection.execute(text("update lead set schema = :schema"), {"schema": schema})

    def guard(self, session: Session | Connection) -> None:
        if self._doubtful:
            with contextlib.suppress(InUseError):  # perhaps by our own connection that broke
                self._hold()
        # Whoever takes over waits for transactions that have begun, and ends those that have not.
        term = session.execute(text("select term from lead for share")).scalar_one()
        if term != self._term:
            raise TakenOverError(
                f"another coordinator has taken over {self.place}, so this one stops; start it "
                "again to stand by"
            )

    def lost(self) -> None:
        self._doubtful = True

    def announce(self, address: str) -> None:
        """Tells those who follow where to reach this coordinator, which has taken the lead."""
        with self.engine.begin() as connection:
            self.guard(connection)
            connection.execute(text("update lead set address = :address"), {"address": address})

    def own_address(self) -> str:
        """This machine's, as the database sees it."""
        with self.engine.begin() as connection:
            seen: str | None = connection.execute(
                text("select host(inet_client_addr())")
            ).scalar_one()
            return seen or LOOPBACK

    def close(self) -> None:
        self._release()
        super().close()

    def _hold(self) -> None:
        """Takes the lock, anew if the connection that had it broke."""
        self._release()
        holder = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if not holder.execute(text("select pg_try_advisory_lock(:key)"), {"key": LOCK}).scalar():
            holder.close()
            raise InUseError(f"{self.place} is in use by another coordinator")
        self._holder, self._doubtful = holder, False

    def _release(self) -> None:
        if self._holder is not None:
            # Closed for good, since back in the pool it would keep the lock.
            with contextlib.suppress(DBAPIError):
                self._holder.invalidate()
            self._holder.close()
            self._holder = None


class FollowedPostgres(Postgres):
    """For a coordinator that follows the one that leads: it only reads."""

    def __init__(self, url: str) -> None:
        super().__init__(url, READ_ONLY)

    def take(self, check: Callable[[Connection], None] = lambda _: None) -> None:
        raise AssertionError("who follows does not lead")

    def guard(self, session: Session | Connection) -> None: ...

    def leader(self) -> tuple[int, str] | None:
        """Term and address of the coordinator that leads; None if none is there yet, or that cannot
        be known now."""
        with contextlib.suppress(DBAPIError), self.engine.begin() as connection:
            found = connection.execute(text("select term, address from lead")).one_or_none()
            if found is not None and found.address is not None:
                return found.term, found.address
        return None


def read_only(file: Path) -> str:
    """URI of a SQLite database that is only read, also on a disk that nobody can write."""
    uri = f"{file.resolve().as_uri()}?mode=ro"
    # SQLite makes files beside one with a write-ahead log, unless it never changes.
    log = file.with_name(f"{file.name}-wal")
    alone = not log.exists() and not os.access(file.resolve().parent, os.W_OK)
    return f"{uri}&immutable=1" if alone else uri


def postgres_engine(url: str, options: str = "") -> Engine:
    """Connections to the database of `url`.

    Args:
        options: further ones of each connection, as PostgreSQL's command line has them.

    Raises:
        ValueError: `url` is no address of a PostgreSQL database.
        MissingPartError: its driver is not installed.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    # Without `url` in the message: there may be a password in it.
    if parsed is None or parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise ValueError("give postgresql://USER:PASSWORD@HOST:PORT/NAME; SQLite needs no URL")
    connecting = {
        "connect_timeout": CONNECT_SECONDS,
        "options": f"{KEEPALIVE} {options}",
        "tcp_user_timeout": UNANSWERED_MS,
        **KEEPALIVES,
    }
    try:
        return create_engine(parsed.set(drivername="postgresql+psycopg"), connect_args=connecting)
    except ImportError as error:
        raise MissingPartError(
            "PostgreSQL needs psycopg; install the extra: pip install 'comigs[postgresql]'"
        ) from error


def _configure(connection: Any, _record: Any) -> None:
    """Every commit reaches the disk before it returns."""
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
