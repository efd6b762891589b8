"""What the coordinator remembers: a database, and files of generalists, updates and moments.

A file is written before the row that names it, and the row is committed before anyone is told, so a
kill at any moment loses nothing that was acknowledged.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, func, insert, inspect, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from coordinator import database
from coordinator.database import Database, FollowedPostgres, InUseError, Postgres, Sqlite
from coordinator.quality import Quality
from coordinator.queries import QUERIES
from coordinator.tables import (
    SCHEMA,
    Base,
    Invitation,
    Participant,
    Round,
    Settings,
    Status,
    Update,
)
from coordinator.update_rows import UPDATES, UpdateRows, updates_directory
from edge_runtime.errors import BundleError, StorageError, VersionError
from edge_runtime.files import remove_leftovers, storage_errors, sync, write_atomic

DATABASE = database.FILE
LOCK = "lock"
GENERALISTS = "generalists"
MEMORIES = "memories"
FITTED = "fitted"
ASKED_AT_ONCE = 1000  # a database takes so many values in a query, and many more


class State(UpdateRows):
    """The state directory of one coordinator. Methods block; each write is durable on return.

    Here are its opening, the rounds, and what is deleted when; the layers below have a file each.

    What it says of rounds is about one cohort; `of` gives the same state for another. Methods that
    write raise StorageError if they cannot; nothing has changed then.
    """

    keep_generalists: int | None = None
    """How many of a cohort `clean` leaves, at least; None: all."""

    def __init__(self, directory: Path, url: str | None = None, *, following: bool = False) -> None:
        """Opens or makes the state in `directory` and keeps other coordinators from leading.

        Args:
            url: of a PostgreSQL database for the rows; None: SQLite, in `directory`.
            following: only reads the rows of one that is there, beside the coordinator that leads.

        Raises:
            InUseError: another coordinator uses it.
            StorageError: not writable, or not ours to read.
            VersionError: another version of the program made it.
            ValueError, MissingPartError: see `Postgres`.
        """
        rows: Database
        if following:
            assert url is not None, "SQLite is of one coordinator"
            rows = FollowedPostgres(url)
        else:
            rows = Postgres(url) if url else Sqlite(directory)
        super().__init__(directory, rows)
        # Of all cohorts: held from when what a round starts from is written until a row names it.
        self._naming = threading.RLock()
        self._lock: int | None = None
        if not following:
            self._take()

    def _take(self) -> None:
        directory = self.directory
        with storage_errors(directory):
            if not directory.is_dir():
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                sync(directory.parent)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            with storage_errors(directory / LOCK):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except StorageError as error:
            os.close(self._lock)
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise InUseError(
                f"{directory} is in use by another coordinator; stop that one first, or choose "
                "another --state"
            ) from error
        try:
            with self._storage_errors():
                self._database.take(self._check_files)
                self._check_directory()
                self._check_schema()
                Base.metadata.create_all(self._engine)
            self._sweep()
            self.clean()
            self._remove_uncounted()
            written = (directory / name for name in (GENERALISTS, MEMORIES, FITTED))
            for place in (directory, *written, *(directory / UPDATES).glob("*")):
                remove_leftovers(place)
        except BaseException:
            self.close()  # else nobody could take it, this process included
            raise

    def close(self) -> None:
        self._database.close()
        if self._lock is not None:
            os.close(self._lock)

    def announce(self, host: str, port: int) -> None:
        """Tells coordinators that follow where this one is reached, in PostgreSQL.

        Args:
            host: empty: this machine's address.
        """
        assert isinstance(self._database, Postgres)
        with self._storage_errors():
            found = host or self._database.own_address()
            if ":" in found and not found.startswith("["):
                found = f"[{found}]"  # of IPv6
            self._database.announce(f"{found}:{port}")

    def check(self) -> None:
        """
        Raises:
            TakenOverError: another coordinator goes on with this state.
            StorageError: it cannot be reached.
        """
        with self._transaction():
            pass

    def cohorts(self) -> dict[str, str]:
        """Name of each cohort that has begun -> the contract of its bundle."""
        with self._transaction() as session:
            begun = session.execute(select(Settings.cohort, Settings.contract_sha256))
            return {cohort: contract for cohort, contract in begun}

    def begin(self, settings: Settings, generalist: bytes) -> dict[str, tuple[Any, Any]]:
        """Starts round 1 from `generalist` in a new cohort; in an old one, takes new settings.

        Returns:
            Name -> old and new value of the settings that are not as they were.

        Raises:
            BundleError: the state belongs to a bundle with another contract.
        """
        with self._transaction() as session:
            known = session.get(Settings, self.cohort)
            if known is None:
                file, digest = self._write_generalist(1, generalist)
                self._add_round(
                    session, 1, generalist_file=file, generalist_sha256=digest, oldest=1
                )
            elif known.contract_sha256 != settings.contract_sha256:
                raise BundleError(
                    f"{self.directory} began with a bundle of another base, shared tensors or "
                    "largest rank; serve such a bundle, or choose another --state"
                )
            settings.cohort = self.cohort
            settings.history = secrets.token_hex(8) if known is None else known.history
            changed = {} if known is None else _changes(known, settings)
            session.merge(settings)
            return changed

    def history(self) -> str:
        """Names the course of the rounds that these are. See Settings."""
        with self._transaction() as session:
            return session.get_one(Settings, self.cohort).history

    def begin_anew(self) -> None:
        """What is right once the state was restored from a backup.

        Nobody knows here what has happened since. So the rounds get another history; the round
        that was open is abandoned, since it may have ended, or have been in the middle of secure
        aggregation; and invitations that were not used yet lapse, since they may have been.
        """
        for cohort in self.cohorts():
            restored = self.of(cohort)
            current = restored.current()
            if current.status == Status.OPEN:
                restored.abandon(current.number, "restored from a backup")
            later = Update.counted >= restored.current().number
            with self._transaction() as session:  # asynchronous ones, whose files no backup has
                session.execute(delete(Update).where(Update.cohort == cohort, later))
        with self._transaction() as session:
            for settings in session.scalars(select(Settings)):
                settings.history = secrets.token_hex(8)
            session.execute(delete(Invitation).where(Invitation.key_sha256.is_(None)))

    # Rounds

    def current(self) -> Round:
        """The one round that is WAITING or OPEN."""
        current = self._entity(Round, QUERIES.current)
        assert current is not None, "`begin` made the first one, and each makes the next"
        return current

    def round(self, number: int) -> Round | None:
        with self._transaction() as session:
            return session.get(Round, (self.cohort, number))

    def commanded(self, command: str) -> Round | None:
        """The round that the administrator's command of that id made the current one."""
        with self._transaction() as session:
            return session.scalar(select(Round).where(Round.command == command))

    def last_aggregated(self) -> int:
        """Number of the last round that ended in an average, 0 if none did."""
        with self._transaction() as session:
            aggregated = select(func.max(Round.number)).where(
                Round.cohort == self.cohort, Round.status == Status.AGGREGATED
            )
            return session.scalar(aggregated) or 0

    def open(
        self, number: int, *, deadline: float | None, recipe: str, participants: Iterable[str]
    ) -> None:
        """Lets a waiting round begin now."""
        with self._transaction() as session:
            opened = session.get_one(Round, (self.cohort, number))
            opened.status = Status.OPEN
            opened.opened_at = time.time()
            opened.deadline = deadline
            opened.recipe = recipe
            joined = [
                {"cohort": self.cohort, "round": number, "device": device, "refused": False}
                for device in participants
            ]
            if joined:
                session.execute(insert(Participant), joined)

    def resume(self, number: int, *, deadline: float | None, recipe: str) -> None:
        """Gives an open round another deadline, and the recipe that it will be closed with."""
        with self._transaction() as session:
            resumed = session.get_one(Round, (self.cohort, number))
            resumed.deadline = deadline
            resumed.recipe = recipe

    def pause(self) -> None:
        """Keeps the current round from beginning and from ending."""
        with self._transaction() as session:
            self._current(session).paused = True

    def unpause(self, *, deadline: float | None) -> None:
        """Ends a pause; a round that is open gets another deadline."""
        with self._transaction() as session:
            current = self._current(session)
            current.paused = False
            if current.status == Status.OPEN:
                current.deadline = deadline

    def aggregate(
        self,
        number: int,
        generalist: bytes,
        memory: bytes | None,
        quality: Quality | None = None,
        noise: float | None = None,
        reach: int | None = None,
        clipped: int = 0,
        clipped_coordinates: int = 0,
    ) -> None:
        """Closes an open round. The next one, now waiting, starts from `generalist` and, with a
        server optimizer, from its `memory`. What is not needed any more stays until `clean`.

        Args:
            noise: noise multiplier of differential privacy; None without it.
            reach: how many generalists ago an update may have started that counts in the next
                round; None: it starts from that round's own, and in it.
            clipped, clipped_coordinates: for people, see Round.
        """
        with self._naming:
            file, digest = self._write_generalist(number + 1, generalist)
            memory_file = None if memory is None else self._write_memory(number + 1, memory)
            with self._transaction() as session:
                closed = self._end(session, number, Status.AGGREGATED, quality=quality)
                closed.clipped, closed.clipped_coordinates = clipped, clipped_coordinates
                self._spend(session, number, noise)
                self._add_round(
                    session,
                    number + 1,
                    generalist_file=file,
                    generalist_sha256=digest,
                    memory_file=memory_file,
                    done=closed.done + 1,
                    oldest=self._oldest(session, closed, closed.done + 1, reach),
                )
            self._sweep(number + 1)

    def abandon(
        self,
        number: int,
        reason: str,
        *,
        command: str | None = None,
        quality: Quality | None = None,
        noise: float | None = None,
        reach: int | None = None,
    ) -> None:
        """Ends the current round; the next one, now waiting, starts from the same generalist.

        Args:
            noise: as in `aggregate`, if something is told of what would have come of the round.
            reach: as in `aggregate`.
        """
        with self._transaction() as session:
            abandoned = self._end(session, number, Status.ABANDONED, reason, quality)
            self._spend(session, number, noise)
            self._add_round(
                session,
                number + 1,
                generalist_file=abandoned.generalist_file,
                generalist_sha256=abandoned.generalist_sha256,
                memory_file=abandoned.memory_file,
                done=abandoned.done,
                oldest=self._oldest(session, abandoned, abandoned.done, reach),
                paused=abandoned.paused,
                command=command,
            )
        self._sweep(number + 1)
        self.clean()

    def roll_back(self, to: int, reason: str, *, command: str) -> None:
        """Abandons the current round; the next one, now waiting, starts from the generalist that
        round `to` started from. The server optimizer begins anew."""
        with self._transaction() as session:
            number = self._current(session).number
            abandoned = self._end(session, number, Status.ABANDONED, reason)
            source = session.get_one(Round, (self.cohort, to))
            self._drop_later(session, number)
            self._add_round(
                session,
                number + 1,
                generalist_file=source.generalist_file,
                generalist_sha256=source.generalist_sha256,
                done=source.done,
                oldest=number + 1,
                paused=abandoned.paused,
                rolled_back_to=to,
                command=command,
            )
        self._sweep(number + 1)
        self.clean()

    @contextlib.contextmanager
    def keeping_starts(self) -> Iterator[None]:
        """Meanwhile nothing is deleted that a round starts from."""
        with self._naming:
            yield

    def clean(self) -> None:
        """Deletes the updates and the optimizer's memory of rounds that are over, and generalists
        that are beyond the number to keep; what cannot be deleted now is another time."""
        # Looked for before the rows: what another thread writes meanwhile is not in the list.
        try:
            updates = list((self.directory / UPDATES).glob("*"))
            memories = self._there(MEMORIES)
        except OSError:
            return
        with self.keeping_starts():  # else a roll-back could name one between look and deletion
            self._clean(updates, memories)

    def _clean(self, updates: list[Path], memories: set[str]) -> None:
        try:
            with self._transaction() as session:
                rounds = session.scalars(select(Round).where(_ongoing())).all()
                used = {ongoing.memory_file for ongoing in rounds}
                forgotten = _named(session, Round.memory_file, memories - used)
                # In asynchronous rounds they are beside others that still count.
                over = session.scalars(
                    select(Update.file)
                    .join(Round, (Round.cohort == Update.cohort) & (Update.round >= Round.oldest))
                    .where(_ongoing(), Update.counted < Round.number)
                ).all()
                outdated = self._outdated(session, rounds)
        except (StorageError, OSError):
            return
        for file in (*over, *forgotten, *outdated):
            with contextlib.suppress(OSError):
                (self.directory / file).unlink(missing_ok=True)
        kept = {
            updates_directory(ongoing.cohort, number)
            for ongoing in rounds
            for number in range(ongoing.oldest, ongoing.number + 1)
        }
        for other in updates:
            if f"{UPDATES}/{other.name}" not in kept:
                shutil.rmtree(other, ignore_errors=True)

    def _outdated(self, session: Session, ongoing: Iterable[Round]) -> set[str]:
        """Files of generalists that need not be kept: no cohort has them among its latest ones, and
        no update that may still count started from them."""
        if self.keep_generalists is None:
            return set()
        kept: set[str] = set()
        for current in ongoing:
            own = Round.cohort == current.cohort
            latest = select(Round.generalist_file).where(own).group_by(Round.generalist_file)
            latest = latest.order_by(func.max(Round.number).desc()).limit(self.keep_generalists)
            kept.update(session.scalars(latest))
            may_count = select(Round.generalist_file).where(own, Round.number >= current.oldest)
            kept.update(session.scalars(may_count))
        return _named(session, Round.generalist_file, self._there(GENERALISTS) - kept)

    def _there(self, folder: str) -> set[str]:
        """The files of a folder, as rows name them."""
        return {f"{folder}/{path.name}" for path in (self.directory / folder).glob("*.safetensors")}

    def _remove_uncounted(self) -> None:
        """Deletes updates that a kill kept from being counted; their devices send them again."""
        files = (self.directory / UPDATES).glob("*/*.safetensors")
        found = {path.relative_to(self.directory).as_posix() for path in files}
        with self._transaction() as session:
            counted = _named(session, Update.file, found)
        for file in found - counted:
            (self.directory / file).unlink(missing_ok=True)

    # The inside

    def _check_schema(self) -> None:
        """Marks a new database with SCHEMA; refuses one with another mark."""
        new = not inspect(self._engine).has_table(Round.__tablename__)
        if new:
            self._database.mark(SCHEMA)
        elif self._database.schema() != SCHEMA:
            raise VersionError(
                f"{self._database.place} was made by another version of comigs; go on with that "
                "one, or choose another --state"
            )

    def _check_files(self, connection: Connection) -> None:
        """Refuses a database of another directory."""
        if inspect(connection).has_table(Round.__tablename__):
            for file in connection.scalars(select(Round.generalist_file).where(_ongoing())):
                if not (self.directory / file).exists():
                    raise StorageError(
                        f"{self.directory} lacks {file}, which {self._database.place} names; give "
                        "the --state that belongs to it"
                    )

    def _check_directory(self) -> None:
        """Refuses a directory of another database: what this one does not name would be deleted."""
        latest = 0
        if self._database.is_there():
            with self._engine.begin() as connection:
                if inspect(connection).has_table(Round.__tablename__):
                    latest = connection.scalar(select(func.max(Round.number))) or 0
        # A kill leaves what the next round was to start from, or the first one.
        unknown = [name for name in self._there(GENERALISTS) if _number(name) > latest + 1]
        if not latest:
            accepted = (self.directory / UPDATES).glob("*/*.safetensors")
            unknown += [str(path.relative_to(self.directory)) for path in accepted]
        if unknown:
            raise StorageError(
                f"{self.directory} holds {min(unknown)}, of which {self._database.place} knows "
                "nothing; give the --database that belongs to it, or leave that out, or give "
                "another --state"
            )

    def _current(self, session: Session) -> Round:
        chosen = select(Round).where(Round.cohort == self.cohort, _ongoing())
        return session.scalars(chosen.order_by(Round.number.desc()).limit(1)).one()

    def _end(
        self,
        session: Session,
        number: int,
        status: Status,
        reason: str | None = None,
        quality: Quality | None = None,
    ) -> Round:
        ended = session.get_one(Round, (self.cohort, number))
        ended.status = status
        ended.closed_at = time.time()
        ended.reason = reason
        self._forget_masking(session, number)
        if quality is not None:
            ended.incoming_perplexity = quality.incoming
            ended.candidate_perplexity = quality.candidate
        return ended

    def _add_round(self, session: Session, number: int, **start: Any) -> None:
        """A round that waits to be opened; `start` has what it starts from and with."""
        session.add(Round(cohort=self.cohort, number=number, status=Status.WAITING, **start))

    def _oldest(self, session: Session, ended: Round, done: int, reach: int | None) -> int:
        """From which round on updates may count in the next one. Those that were accepted for it
        or a later one do, whatever the settings are now.

        Args:
            done: generalists that were made before the next round.
        """
        following = ended.number + 1
        accepted = select(func.min(Update.round)).where(
            Update.cohort == self.cohort, Update.counted >= following
        )
        first = session.scalar(accepted) or following
        if reach is not None:
            near = (Round.cohort == self.cohort) & (Round.done >= done - reach)
            within = select(func.min(Round.number)).where(near, Round.number >= ended.oldest)
            first = min(first, session.scalar(within) or following)
        return max(ended.oldest, first)

    def _write_generalist(self, number: int, generalist: bytes) -> tuple[str, str]:
        """Path, below the state directory, and SHA-256 (hex) of what round `number` starts from."""
        digest = hashlib.sha256(generalist).hexdigest()
        relative = f"{GENERALISTS}/{number}-{digest}.safetensors"
        write_atomic(self.directory / relative, generalist)
        return relative, digest

    def _write_memory(self, number: int, memory: bytes) -> str:
        relative = f"{MEMORIES}/{number}-{hashlib.sha256(memory).hexdigest()}.safetensors"
        write_atomic(self.directory / relative, memory)
        return relative

    def _sweep(self, number: int | None = None) -> None:
        """Deletes what attempts that failed, or were killed, have left of what a round was to start
        from: with differential privacy that is another noise on the same sum.

        Args:
            number: of the round, in all cohorts; None: of all rounds.
        """
        those = "" if number is None else f"{number}-"
        columns = {GENERALISTS: Round.generalist_file, MEMORIES: Round.memory_file}
        with self._naming:
            for folder, column in columns.items():
                with contextlib.suppress(StorageError, OSError):
                    files = (self.directory / folder).glob(f"{those}*.safetensors")
                    found = {f"{folder}/{path.name}" for path in files}
                    with self._transaction() as session:
                        named = set(
                            session.scalars(
                                select(column).where(column.startswith(f"{folder}/{those}"))
                            )
                        )
                    for file in found - named:
                        (self.directory / file).unlink(missing_ok=True)


def _changes(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Name -> values, of the settings that differ; those of the training one by one, of which zeros
    are left out in its JSON."""
    known, wanted = (
        {column.key: getattr(settings, column.key) for column in Settings.__table__.columns}
        | {f"training.{key}": value for key, value in json.loads(settings.training).items()}
        for settings in (old, new)
    )
    beside = {"training", "training.rounds"}
    return {
        name: (known.get(name, 0), wanted.get(name, 0))
        for name in sorted((known.keys() | wanted.keys()) - beside)
        if known.get(name, 0) != wanted.get(name, 0)
    }


def _named(session: Session, column: InstrumentedAttribute[Any], files: set[str]) -> set[str]:
    """Those of the files that a row has in `column`: another is not written yet, or not ours."""
    asked, named = list(files), set[str]()
    for first in range(0, len(asked), ASKED_AT_ONCE):
        named.update(
            session.scalars(select(column).where(column.in_(asked[first:][:ASKED_AT_ONCE])))
        )
    return named


def _number(file: str) -> int:
    """Of the round that starts from the generalist of that name; 0 if it is none of ours."""
    number = Path(file).name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def _ongoing() -> ColumnElement[bool]:
    return Round.status.in_([Status.WAITING, Status.OPEN])
