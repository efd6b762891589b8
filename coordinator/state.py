"""What the coordinator remembers: a database, and files of generalists, updates and moments.

A file is written before the row that names it, and the row is committed before anyone is told, so a
kill at any moment loses nothing that was acknowledged.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Select,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import (
    Session,
)

from coordinator import database
from coordinator.database import Database, FollowedPostgres, InUseError, Postgres, Sqlite
from coordinator.quality import Quality
from coordinator.queries import QUERIES
from coordinator.tables import (
    SCHEMA,
    Base,
    Change,
    Delivery,
    Device,
    Invitation,
    MaskingGroup,
    MaskingMember,
    MaskingStage,
    MaskingStanding,
    MaskingStep,
    Participant,
    PrivacySpend,
    Refusal,
    Round,
    Settings,
    Standing,
    Status,
    Update,
)
from edge_runtime.errors import BundleError, StorageError
from edge_runtime.files import (
    make_directory,
    remove_leftovers,
    storage_errors,
    sync,
    write_atomic,
)

DATABASE = database.FILE
LOCK = "lock"
GENERALISTS = "generalists"
MEMORIES = "memories"
UPDATES = "updates"
FITTED = "fitted"
# Of a device's refused updates so many are kept: a hostile one could fill the disk with them.
REFUSALS_AN_HOUR = 60

E = TypeVar("E", bound="Base")


class State:
    """The state directory of one coordinator. Methods block; each write is durable on return.

    What it says of rounds is about one cohort; `of` gives the same state for another. Methods that
    write raise StorageError if they cannot; nothing has changed then.
    """

    cohort = ""
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
            ValueError, MissingPartError: see `Postgres`.
        """
        self.directory = directory
        self._lock: int | None = None
        self._database: Database
        if following:
            assert url is not None, "SQLite is of one coordinator"
            self._database = FollowedPostgres(url)
        else:
            self._database = Postgres(url) if url else Sqlite(directory)
        self._engine = self._database.engine
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
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InUseError(
                f"{directory} is in use by another coordinator; stop that one first, or choose "
                "another --state"
            ) from error
        try:
            with self._storage_errors():
                self._database.take()
                self._check_schema()
                Base.metadata.create_all(self._engine)
            if isinstance(self._database, Postgres):
                self._check_files()
        except BaseException:
            self.close()
            raise
        self._sweep()
        self.clean()
        self._remove_uncounted()
        written = (directory / name for name in (GENERALISTS, MEMORIES, FITTED))
        for place in (directory, *written, *(directory / UPDATES).glob("*")):
            remove_leftovers(place)

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
            self._database.announce(f"{host or self._database.own_address()}:{port}")

    def check(self) -> None:
        """
        Raises:
            TakenOverError: another coordinator goes on with this state.
            StorageError: it cannot be reached.
        """
        with self._transaction():
            pass

    def of(self, cohort: str) -> State:
        """The same state, for the rounds of `cohort`."""
        other = copy.copy(self)
        other.cohort = cohort
        return other

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
                session.add(
                    Round(
                        cohort=self.cohort,
                        number=1,
                        status=Status.WAITING,
                        generalist_file=file,
                        generalist_sha256=digest,
                        oldest=1,
                    )
                )
            elif known.contract_sha256 != settings.contract_sha256:
                raise BundleError(
                    f"{self.directory} belongs to a bundle with another base or other shared "
                    "tensors; serve that bundle, or choose another --state"
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

    # Devices

    def invite(
        self, name: str, token: bytes, expires_at: float, *, cohort: str | None = None
    ) -> None:
        """Lets one device enrol as `name`; an earlier invitation for it is forgotten.

        Only a hash of `token` is kept.
        """
        with self._transaction() as session:
            session.execute(delete(Invitation).where(Invitation.name == name))
            digest = hashlib.sha256(token).digest()
            session.add(
                Invitation(name=name, token_sha256=digest, expires_at=expires_at, cohort=cohort)
            )

    def invitation(self, token: bytes) -> Invitation | None:
        digest = hashlib.sha256(token).digest()
        with self._transaction() as session:
            return session.scalar(select(Invitation).where(Invitation.token_sha256 == digest))

    def enrol(
        self,
        name: str,
        *,
        cohort: str,
        contract_sha256: str,
        enrolment: str,
        key_sha256: bytes,
        valid_until: float,
        tier: str | None,
    ) -> Device:
        """Notes that the holder of a key used the invitation for `name`.

        It becomes the device of that name, in the place of an earlier one, revoked or not.
        """
        with self._transaction() as session:
            invitation = session.get_one(Invitation, name)
            invitation.key_sha256, invitation.enrolment = key_sha256, enrolment
            device = _named(session, name)
            device.cohort, device.contract_sha256 = cohort, contract_sha256
            device.enrolment = enrolment
            device.enrolled_at = time.time()
            device.valid_until = valid_until
            device.revoked_at = None
            device.tier = tier
            device.stored_round = 0
            return device

    def extend(self, enrolment: str, valid_until: float) -> None:
        """Notes that the device of that enrolment has a certificate until then."""
        with self._transaction() as session:
            enrolled = select(Device).where(Device.enrolment == enrolment)
            session.scalars(enrolled).one().valid_until = valid_until

    def disinvite(self, name: str) -> bool:
        """Forgets the invitation for `name`. Returns whether there was one."""
        with self._transaction() as session:
            invitation = session.get(Invitation, name)
            if invitation is not None:
                session.delete(invitation)
            return invitation is not None

    def revoke(self, name: str) -> Device | None:
        """Accepts no certificate of the device of that name any more.

        Returns:
            The device; None if there is none that is not revoked already.
        """
        with self._transaction() as session:
            chosen = select(Device).where(Device.name == name, Device.revoked_at.is_(None))
            device = session.scalar(chosen)
            if device is not None:
                device.enrolment = None
                device.revoked_at = time.time()
            return device

    def enrolled(self, enrolment: str) -> Device | None:
        """The device whose certificates carry `enrolment` now."""
        return self._entity(Device, QUERIES.enrolled, enrolment=enrolment)

    def enrolments(self) -> set[str]:
        """Those whose certificates are accepted."""
        with self._transaction() as session:
            chosen = select(Device.enrolment).where(Device.enrolment.is_not(None))
            return {enrolment for enrolment in session.scalars(chosen) if enrolment}

    def named(self, name: str, *, cohort: str, contract_sha256: str) -> Device:
        """The device of that name, made if there is none: for those who need not enrol."""
        with self._transaction() as session:
            device = _named(session, name)
            device.cohort, device.contract_sha256 = cohort, contract_sha256
            return device

    def devices(self) -> list[Device]:
        """All devices, revoked ones too, by name."""
        with self._transaction() as session:
            return list(session.scalars(select(Device).order_by(Device.name)))

    def revoked(self) -> set[str]:
        """Ids of the devices that are revoked, or enrolled again in another cohort."""
        gone = Device.revoked_at.is_not(None) | (Device.cohort != self.cohort)
        with self._transaction() as session:
            return set(session.scalars(select(Device.id).where(gone)))

    def names(self, devices: Iterable[str]) -> dict[str, str]:
        """Name -> id of those of `devices` that are known."""
        with self._transaction() as session:
            chosen = select(Device.name, Device.id).where(Device.id.in_(list(devices)))
            return {name: device for name, device in session.execute(chosen)}

    def delivered(self, number: int) -> set[str]:
        """Ids of the devices that have stored the final generalist, that of round `number`."""
        with self._transaction() as session:
            return set(session.scalars(select(Device.id).where(Device.stored_round == number)))

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
        reach: int = 0,
    ) -> None:
        """Closes an open round. The next one, now waiting, starts from `generalist` and, with a
        server optimizer, from its `memory`. What is not needed any more stays until `clean`.

        Args:
            noise: noise multiplier of differential privacy; None without it.
            reach: from how many earlier rounds updates may count in the next one.
        """
        file, digest = self._write_generalist(number + 1, generalist)
        memory_file = None if memory is None else self._write_memory(number + 1, memory)
        with self._transaction() as session:
            closed = self._end(session, number, Status.AGGREGATED, quality=quality)
            self._spend(session, number, noise)
            session.add(
                Round(
                    cohort=self.cohort,
                    number=number + 1,
                    status=Status.WAITING,
                    generalist_file=file,
                    generalist_sha256=digest,
                    memory_file=memory_file,
                    done=closed.done + 1,
                    oldest=max(closed.oldest, number + 1 - reach),
                )
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
        reach: int = 0,
    ) -> None:
        """Ends the current round; the next one, now waiting, starts from the same generalist.

        Args:
            noise: as in `aggregate`, if something is told of what would have come of the round.
            reach: as in `aggregate`.
        """
        with self._transaction() as session:
            abandoned = self._end(session, number, Status.ABANDONED, reason, quality)
            self._spend(session, number, noise)
            session.add(
                Round(
                    cohort=self.cohort,
                    number=number + 1,
                    status=Status.WAITING,
                    generalist_file=abandoned.generalist_file,
                    generalist_sha256=abandoned.generalist_sha256,
                    memory_file=abandoned.memory_file,
                    done=abandoned.done,
                    oldest=max(abandoned.oldest, number + 1 - reach),
                    paused=abandoned.paused,
                    command=command,
                )
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
            # Those that were to count later are dropped with it.
            later = (Update.cohort == self.cohort) & (Update.counted > number)
            session.execute(update(Update).where(later).values(counted=number))
            session.add(
                Round(
                    cohort=self.cohort,
                    number=number + 1,
                    status=Status.WAITING,
                    generalist_file=source.generalist_file,
                    generalist_sha256=source.generalist_sha256,
                    done=source.done,
                    oldest=number + 1,
                    paused=abandoned.paused,
                    rolled_back_to=to,
                    command=command,
                )
            )
        self._sweep(number + 1)
        self.clean()

    def clean(self) -> None:
        """Deletes the updates and the optimizer's memory of rounds that are over, and generalists
        that are beyond the number to keep; what cannot be deleted now is another time."""
        # Looked for before the rows: what another thread writes meanwhile is not in the list.
        updates = list((self.directory / UPDATES).glob("*"))
        memories = list((self.directory / MEMORIES).glob("*.safetensors"))
        try:
            with self._transaction() as session:
                rounds = session.scalars(select(Round).where(_ongoing())).all()
                remembered = set(
                    session.scalars(
                        select(Round.memory_file).where(~_ongoing(), Round.memory_file.is_not(None))
                    )
                )
                # In asynchronous rounds they are beside others that still count.
                over = session.scalars(
                    select(Update.file)
                    .join(Round, (Round.cohort == Update.cohort) & (Update.round >= Round.oldest))
                    .where(_ongoing(), Update.counted < Round.number)
                ).all()
                outdated = self._outdated(session, rounds)
        except StorageError:
            return
        for file in (*over, *outdated):
            with contextlib.suppress(OSError):
                (self.directory / file).unlink(missing_ok=True)
        kept = {
            _updates_directory(ongoing.cohort, number)
            for ongoing in rounds
            for number in range(ongoing.oldest, ongoing.number + 1)
        }
        for other in updates:
            if f"{UPDATES}/{other.name}" not in kept:
                shutil.rmtree(other, ignore_errors=True)
        forgotten = remembered - {ongoing.memory_file for ongoing in rounds}
        for path in memories:
            if f"{MEMORIES}/{path.name}" in forgotten:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _outdated(self, session: Session, ongoing: Iterable[Round]) -> set[str]:
        """Files of generalists that need not be kept: no cohort has them among its latest ones, and
        no update that may still count started from them."""
        if self.keep_generalists is None:
            return set()
        named: set[str] = set()
        kept: set[str] = set()
        for current in ongoing:
            starts = session.execute(
                select(Round.number, Round.generalist_file)
                .where(Round.cohort == current.cohort)
                .order_by(Round.number.desc())
            ).all()
            latest = list(dict.fromkeys(file for _, file in starts))
            named.update(latest)
            kept.update(latest[: self.keep_generalists])
            kept.update(file for number, file in starts if number >= current.oldest)
        return named - kept

    def _remove_uncounted(self) -> None:
        """Deletes updates that a kill kept from being counted; their devices send them again."""
        with self._transaction() as session:
            counted = set(session.scalars(select(Update.file)))
        for path in (self.directory / UPDATES).glob("*/*.safetensors"):
            if path.relative_to(self.directory).as_posix() not in counted:
                path.unlink(missing_ok=True)

    # Participants, updates and refusals

    def participants(self, number: int) -> set[str]:
        with self._transaction() as session:
            chosen = select(Participant.device).where(
                Participant.cohort == self.cohort, Participant.round == number
            )
            return set(session.scalars(chosen))

    def standing(self, number: int, device: str) -> Standing:
        ((refused, sha256),) = self._ask(QUERIES.standing, round=number, device=device)
        return Standing(participates=refused is not None, refused=bool(refused), sha256=sha256)

    def misses_any(
        self,
        number: int,
        *,
        returning: bool,
        done: type[Update | MaskingMember] = Update,
    ) -> bool:
        """Whether a participant of the round is yet to report or, if they are `returning`, a device
        that reported in the previous round and that round was aggregated.

        Devices are not missed that had an update refused, or are revoked or in another cohort now.

        Args:
            done: what there is of a device that is not missed.
        """

        queries = [QUERIES.missing[done]]
        if returning:
            queries.append(QUERIES.not_back[done])
        return any(self._ask(query, round=number) for query in queries)

    def updates(self, number: int) -> list[Update]:
        """The accepted updates that count in the round, in the order of device ids."""
        with self._transaction() as session:
            accepted = select(Update).where(self._counted(number))
            return list(session.scalars(accepted.order_by(Update.device)))

    def count_updates(self, number: int) -> int:
        ((count,),) = self._ask(QUERIES.count, round=number)
        return int(count)

    def counts(self, number: int, device: str) -> bool:
        """Whether an update of `device` counts in the round."""
        return bool(self._ask(QUERIES.counts, round=number, device=device))

    def update(self, number: int, device: str) -> Update | None:
        return self._entity(Update, QUERIES.update, round=number, device=device)

    def partial(self, number: int, device: str, sha256: bytes) -> Path:
        """Where the bytes of an update are gathered; nothing may be there yet."""
        return self.directory / self._updates_of(number) / device / f"{sha256.hex()}.partial"

    def kept(self, number: int, device: str, sha256: bytes) -> str | None:
        """The file of an update that is here whole, below the state directory; it counts only if
        a row says so."""
        relative = self._kept(number, device, sha256)
        return relative if (self.directory / relative).exists() else None

    def begin_partial(self, path: Path) -> None:
        """Makes that file, or takes it up again; other unfinished updates of the device go."""
        with storage_errors(path):
            make_directory(path.parent.parent)  # where the update will be
            path.parent.mkdir(exist_ok=True)
            for other in path.parent.iterdir():
                if other != path:
                    other.unlink(missing_ok=True)
            path.touch()

    def keep_partial(self, path: Path, number: int, device: str, sha256: bytes) -> str:
        """Gives a gathered update, whose content becomes durable, its place; only a commit of the
        row makes it count.

        Args:
            path: where it is, whole and checked.
            sha256: of what the device sent.

        Returns:
            The path below the state directory. It holds that hash, so another update of the same
            device never replaces it.

        Raises:
            FileNotFoundError: the round is over, and they are gone.
        """
        relative = self._kept(number, device, sha256)
        if not path.exists():
            raise FileNotFoundError(path)
        with storage_errors(self.directory / relative):
            sync(path)
            os.replace(path, self.directory / relative)
        return relative

    def commit(self, changes: Sequence[Change]) -> None:
        """Makes changes that many devices have caused durable, all of them or none."""
        for change in changes:
            change.cohort = self.cohort
        files = (self.directory / row.file for row in changes if isinstance(row, Update))
        for directory in {file.parent for file in files}:
            with storage_errors(directory):
                sync(directory)
        with self._transaction() as session:
            for change in changes:
                if isinstance(change, Delivery):
                    session.get_one(Device, change.device).stored_round = change.round
                elif isinstance(change, Refusal):
                    self._add_refusal(session, change)
                elif isinstance(change, MaskingStep):
                    self._note_step(session, change)
                else:
                    session.add(change)

    def drop_update(self, number: int, device: str, reason: str) -> str:
        """Refuses an accepted update after all; its file goes. Returns the device's name."""
        chosen = select(Update).where(self._counted(number), Update.device == device)
        with self._transaction() as session:
            dropped = session.scalars(chosen).one()
            session.delete(dropped)
            self._add_refusal(
                session,
                Refusal(
                    cohort=self.cohort,
                    round=dropped.round,
                    device=device,
                    reason=reason,
                    time=time.time(),
                ),
            )
            name = session.get_one(Device, device).name
        with contextlib.suppress(OSError):
            (self.directory / dropped.file).unlink(missing_ok=True)
        return name

    def _add_refusal(self, session: Session, refusal: Refusal) -> None:
        """Notes that an update of a device was refused; of many in an hour, the first ones."""
        lately = (Refusal.device == refusal.device) & (Refusal.time > refusal.time - 3600)
        count = session.scalar(select(func.count()).select_from(Refusal).where(lately)) or 0
        if count < REFUSALS_AN_HOUR:
            session.add(refusal)
        whose = (self.cohort, refusal.round, refusal.device)
        participant = session.get(Participant, whose)
        if participant is not None:
            participant.refused = True

    # Differential privacy

    def privacy_spent(self) -> dict[float, int]:
        """Noise multiplier -> how many rounds were told of that had it."""
        counted = select(PrivacySpend.noise_multiplier, func.count()).where(
            PrivacySpend.cohort == self.cohort
        )
        with self._transaction() as session:
            rows = session.execute(counted.group_by(PrivacySpend.noise_multiplier))
            return {multiplier: count for multiplier, count in rows}

    def has_spent(self, number: int) -> bool:
        """Whether the round is paid for."""
        with self._transaction() as session:
            return session.get(PrivacySpend, (self.cohort, number)) is not None

    def aggregated_without_noise(self) -> bool:
        """Whether a round was aggregated without differential privacy."""
        spent = select(PrivacySpend.round).where(PrivacySpend.cohort == self.cohort)
        plain = select(Round.number).where(
            Round.cohort == self.cohort,
            # The quality gate tells of those that it turned down.
            (Round.status == Status.AGGREGATED) | Round.candidate_perplexity.is_not(None),
            Round.number.not_in(spent),
        )
        with self._transaction() as session:
            return session.scalar(plain.limit(1)) is not None

    # Secure aggregation

    def unreliable(self, number: int) -> set[str]:
        """Devices that the round does not wait for: revoked, or something of them was refused."""
        refused = select(Participant.device).where(
            self._in(Participant, number), Participant.refused
        )
        with self._transaction() as session:
            return set(session.scalars(refused)) | self.revoked()

    def masking_group(self, number: int) -> MaskingGroup | None:
        """None while the round's group is not settled."""
        return self._entity(MaskingGroup, QUERIES.masking_group, round=number)

    def masking_members(self, number: int) -> list[MaskingMember]:
        """Those who advertised keys, in the order of device ids."""
        with self._transaction() as session:
            chosen = self._masking_members(number).order_by(MaskingMember.device)
            return list(session.scalars(chosen))

    def masking_numbers(self, number: int, *, said: str = "keys") -> dict[str, int | None]:
        """Device -> its number in the group, None before it is settled.

        Args:
            said: which devices: those that sent "keys" or "shares", "agreed", or "revealed" some.
        """
        column = getattr(MaskingMember, said)
        with self._transaction() as session:
            chosen = self._masking_members(number).where(column.is_not(None))
            columns = chosen.with_only_columns(MaskingMember.device, MaskingMember.number)
            return {device: given for device, given in session.execute(columns)}

    def masking_standing(self, number: int, device: str) -> MaskingStanding | None:
        """How a device stands in the round's secure aggregation; None if it advertised no keys."""
        columns = (
            MaskingMember.number,
            MaskingMember.shares.is_not(None),
            MaskingMember.agreed.is_not(None),
            MaskingMember.revealed.is_not(None),
        )
        chosen = self._masking_members(number).where(MaskingMember.device == device)
        with self._transaction() as session:
            row = session.execute(chosen.with_only_columns(*columns)).one_or_none()
        return None if row is None else MaskingStanding(row[0], *map(bool, row[1:]))

    def count_masking(self, number: int, *, said: str = "keys") -> int:
        """How many devices `masking_numbers` would list."""
        column = getattr(MaskingMember, said)
        counted = select(func.count()).where(self._in(MaskingMember, number), column.is_not(None))
        with self._transaction() as session:
            return session.scalar(counted) or 0

    def settle(
        self,
        number: int,
        numbers: Mapping[str, int],
        *,
        degree: int,
        terms: bytes,
        divisor: int | None = None,
    ) -> None:
        """Begins secure aggregation with the devices in `numbers`; forgets others' keys."""
        with self._transaction() as session:
            session.add(
                MaskingGroup(
                    cohort=self.cohort,
                    round=number,
                    stage=MaskingStage.SHARE,
                    degree=degree,
                    terms=terms,
                    divisor=divisor,
                )
            )
            for member in session.scalars(self._masking_members(number)):
                if member.device in numbers:
                    member.number = numbers[member.device]
                else:
                    session.delete(member)

    def set_masking_stage(
        self, number: int, stage: MaskingStage, *, noise: float | None = None
    ) -> None:
        """
        Args:
            noise: as in `aggregate`, if something of the sum may be learnt from now on.
        """
        with self._transaction() as session:
            session.get_one(MaskingGroup, (self.cohort, number)).stage = stage
            self._spend(session, number, noise)

    def agreements(self, number: int) -> dict[int, bytes]:
        """Number in the group -> signature."""
        columns = MaskingMember.number, MaskingMember.agreed
        chosen = self._masking_members(number).where(MaskingMember.agreed.is_not(None))
        with self._transaction() as session:
            rows = session.execute(chosen.with_only_columns(*columns))
            return {index: agreed for index, agreed in rows if index and agreed}

    def _note_step(self, session: Session, step: MaskingStep) -> None:
        """Of keys, the latest ones count."""
        whose = {"cohort": self.cohort, "round": step.round, "device": step.device}
        if step.said == "keys":
            session.merge(MaskingMember(**whose, keys=step.content))
        else:
            setattr(session.get_one(MaskingMember, whose), step.said, step.content)

    def _masking_members(self, number: int) -> Select[MaskingMember]:
        return select(MaskingMember).where(self._in(MaskingMember, number))

    def _spend(self, session: Session, number: int, noise: float | None) -> None:
        """Notes what a round costs of the privacy budget; once, however often it is noted."""
        if noise is not None:
            spend = PrivacySpend(cohort=self.cohort, round=number, noise_multiplier=noise)
            session.merge(spend)

    def _forget_masking(self, session: Session, number: int) -> None:
        """Deletes what secure aggregation of a round that is over has left."""
        session.execute(delete(MaskingMember).where(self._in(MaskingMember, number)))
        session.execute(delete(MaskingGroup).where(self._in(MaskingGroup, number)))

    # The inside

    def _check_schema(self) -> None:
        """Marks a new database with SCHEMA; refuses one with another mark."""
        new = not inspect(self._engine).has_table(Round.__tablename__)
        if new:
            self._database.mark(SCHEMA)
        elif self._database.schema() != SCHEMA:
            raise StorageError(
                f"{self._database.place} was made by another version of comigs; go on with that "
                "one, or choose another --state"
            )

    def _check_files(self) -> None:
        """Refuses a database of another directory."""
        with self._transaction() as session:
            for ongoing in session.scalars(select(Round).where(_ongoing())):
                if not (self.directory / ongoing.generalist_file).exists():
                    raise StorageError(
                        f"{self.directory} lacks {ongoing.generalist_file}, which "
                        f"{self._database.place} names; give the --state that belongs to it"
                    )

    def _current(self, session: Session) -> Round:
        chosen = select(Round).where(Round.cohort == self.cohort, _ongoing())
        return session.scalars(chosen).one()

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
            number: of the round; None: of all. No other thread may be about to write one.
        """
        those = "" if number is None else f"{number}-"
        columns = {GENERALISTS: Round.generalist_file, MEMORIES: Round.memory_file}
        for folder, column in columns.items():
            files = (self.directory / folder).glob(f"{those}*.safetensors")
            found = {f"{folder}/{path.name}" for path in files}
            with contextlib.suppress(StorageError, OSError):
                with self._transaction() as session:
                    named = set(
                        session.scalars(
                            select(column).where(column.startswith(f"{folder}/{those}"))
                        )
                    )
                for file in found - named:
                    (self.directory / file).unlink(missing_ok=True)

    def _in(
        self, rows: type[Participant | Update | MaskingMember | MaskingGroup], number: int
    ) -> ColumnElement[bool]:
        """Whether rows are of round `number`."""
        return (rows.cohort == self.cohort) & (rows.round == number)

    def _counted(self, number: int) -> ColumnElement[bool]:
        """Whether updates count in round `number`."""
        return (Update.cohort == self.cohort) & (Update.counted == number)

    def _kept(self, number: int, device: str, sha256: bytes) -> str:
        return f"{self._updates_of(number)}/{device}-{sha256.hex()}.safetensors"

    def _updates_of(self, number: int) -> str:
        return _updates_directory(self.cohort, number)

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
            raise StorageError(
                f"cannot use {self._database.place}: {reason}; free some space or check that it "
                "is there: what was acknowledged before is intact"
            ) from error


@functools.lru_cache(maxsize=4096)
def _made(kind: type[E], values: tuple[Any, ...]) -> E:
    """An object of that kind, which takes longer to make than to be found in the database."""
    names = (column.key for column in kind.__table__.columns)
    return kind(**dict(zip(names, values, strict=True)))


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


def _named(session: Session, name: str) -> Device:
    device = session.scalar(select(Device).where(Device.name == name))
    if device is None:
        now = time.time()
        device = Device(
            id=secrets.token_hex(16),
            name=name,
            cohort="",
            contract_sha256="",
            enrolled_at=now,
            valid_until=now,
        )
        session.add(device)
    return device


def _ongoing() -> ColumnElement[bool]:
    return Round.status.in_([Status.WAITING, Status.OPEN])


def _updates_directory(cohort: str, number: int) -> str:
    return f"{UPDATES}/{number}-{cohort}"
