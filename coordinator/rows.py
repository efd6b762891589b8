"""All rows of a coordinator, from PostgreSQL into a SQLite file, as a backup has them, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import URL, Connection, create_engine, func, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError

from coordinator.database import Postgres, postgres_engine
from coordinator.tables import SCHEMA, Base, Round
from edge_runtime.errors import StorageError, VersionError

AT_A_TIME = 1000


def from_postgres(url: str, file: Path) -> None:
    """Writes the rows of the database of `url`, as they are at one moment, into a new SQLite file.
    The coordinator that uses it may be running.

    Raises:
        ValueError: `url` is no address of a PostgreSQL database, or holds no coordinator's state.
        StorageError: it cannot be read, or `file` cannot be written.
        VersionError: another version of the program made it.
    """
    engine = postgres_engine(url)
    place = engine.url.render_as_string(hide_password=True)
    try:
        with (
            _storage_errors(place),
            # One look at all tables: PostgreSQL shows what was there when it began.
            engine.connect().execution_options(isolation_level="REPEATABLE READ") as source,
            _sqlite(file) as target,
        ):
            if not inspect(source).has_table(Round.__tablename__):
                raise ValueError(f"{place} holds no state of a coordinator; check --database")
            if source.execute(text("select schema from lead")).scalar_one() != SCHEMA:
                raise VersionError(
                    f"{place} was made by another version of comigs; back it up with that one"
                )
            Base.metadata.create_all(target)
            _copy(source, target)
            target.exec_driver_sql(f"PRAGMA user_version={SCHEMA}")
    finally:
        engine.dispose()


def to_postgres(file: Path, url: str) -> None:
    """Makes the tables in the database of `url`, with the rows of a SQLite file; all, or none.

    Raises:
        ValueError: `url` is no address of a PostgreSQL database, or it has a coordinator's state.
        StorageError: it cannot be written, or `file` cannot be read.
    """
    database = Postgres(url)
    try:
        with _storage_errors(database.place):
            database.take()  # keeps coordinators away meanwhile
            with database.engine.begin() as target, _sqlite(file) as source:
                if inspect(target).has_table(Round.__tablename__):
                    raise ValueError(f"{database.place} is not empty; give an empty database")
                Base.metadata.create_all(target)
                _copy(source, target)
                for table in Base.metadata.sorted_tables:
                    # Rows that number themselves go on after the ones that were copied.
                    if (column := table.autoincrement_column) is not None:
                        sequence = func.pg_get_serial_sequence(table.name, column.name)
                        last = select(func.max(column)).scalar_subquery()
                        target.execute(select(func.setval(sequence, func.coalesce(last, 1))))
                target.execute(text("update lead set schema = :schema"), {"schema": SCHEMA})
    finally:
        database.close()


def _copy(source: Connection, target: Connection) -> None:
    # Tables that others refer to come first.
    for table in Base.metadata.sorted_tables:
        rows = source.execute(select(table)).mappings()
        for part in rows.partitions(AT_A_TIME):
            target.execute(insert(table), [dict(row) for row in part])


@contextlib.contextmanager
def _sqlite(file: Path) -> Iterator[Connection]:
    engine = create_engine(URL.create("sqlite", database=str(file)))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


@contextlib.contextmanager
def _storage_errors(place: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        raise StorageError(f"cannot copy the rows of {place}: {reason}") from error
