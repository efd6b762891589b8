"""The layer below State: the database of one coordinator, and how it is asked."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import ColumnElement, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from coordinator.database import Database, damaged, is_damage
from coordinator.tables import Base, MaskingGroup, MaskingMember, Participant, Update
from edge_runtime.errors import StorageError

E = TypeVar("E", bound="Base")


class Store:
    """Rows of one cohort; `of` gives those of another."""

    cohort = ""

    def __init__(self, directory: Path, database: Database) -> None:
        self.directory = directory
        self._database = database
        self._engine = database.engine

    def of(self, cohort: str) -> Self:
        """The same, for the rounds of `cohort`."""
        other = copy.copy(self)
        other.cohort = cohort
        return other

    def _in(
        self, rows: type[Participant | Update | MaskingMember | MaskingGroup], number: int
    ) -> ColumnElement[bool]:
        """Whether rows are of round `number`."""
        return (rows.cohort == self.cohort) & (rows.round == number)

    def _counted(self, number: int) -> ColumnElement[bool]:
        """Whether updates count in round `number`."""
        return (Update.cohort == self.cohort) & (Update.counted == number)

    def _ask(self, query: Select[Any], **about: Any) -> Sequence[Any]:
        """The rows of one of the QUERIES."""
        with self._storage_errors():
            return self._database.ask(query, {"cohort": self.cohort, **about})

    def _entity(self, kind: type[E], query: Select[Any], **about: Any) -> E | None:
        """The one row of that kind; not to be changed."""
        rows = self._ask(query, **about)
        return _made(kind, tuple(rows[0])) if rows else None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Session]:
        with (
            self._storage_errors(),
            Session(self._engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            self._database.guard(session)
            yield session

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            self._database.lost()
            reason = " ".join(str(error.orig).split())
            if is_damage(error.orig):
                raise damaged(self._database.place, reason) from error
            raise StorageError(
                f"cannot use {self._database.place}: {reason}; free some space or check that it "
                "is there: what was acknowledged before is intact"
            ) from error


@functools.lru_cache(maxsize=4096)
def _made(kind: type[E], values: tuple[Any, ...]) -> E:
    """An object of that kind, which takes longer to make than to be found in the database."""
    names = (column.key for column in kind.__table__.columns)
    return kind(**dict(zip(names, values, strict=True)))
