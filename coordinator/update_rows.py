"""The layer of State with what devices cause in a round: who takes part, which updates were
accepted or refused, and their files."""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from coordinator.private_rows import PrivateRows
from coordinator.queries import QUERIES
from coordinator.tables import (
    Change,
    Delivery,
    Device,
    MaskingMember,
    MaskingStep,
    Participant,
    Refusal,
    Standing,
    Update,
)
from edge_runtime.files import make_directory, storage_errors, sync

UPDATES = "updates"
# Of a device's refused updates so many are kept: a hostile one could fill the disk with them.
REFUSALS_AN_HOUR = 60


class UpdateRows(PrivateRows):
    """Participants, updates and refusals."""

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
        """Makes that file, or takes it up again; other unfinished updates of the device go.

        Raises:
            FileNotFoundError: the round is over, and its directory goes meanwhile.
        """
        with round_errors(path):
            make_directory(path.parent.parent)  # where the update will be
            path.parent.mkdir(exist_ok=True)
            rounds = path.parents[2]  # asynchronous ones are there together
            # Not Path.glob: it fails when a round that is over goes meanwhile.
            for other in glob.glob(f"{glob.escape(str(rounds))}/*/{path.parent.name}/*"):
                if other != str(path):
                    Path(other).unlink(missing_ok=True)
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
        with round_errors(self.directory / relative):
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

    def is_buffered(self, number: int) -> bool:
        """Whether updates of other rounds, reported in asynchronous ones, count in the round or
        later."""
        with self._transaction() as session:
            others = select(Update.device).where(
                Update.cohort == self.cohort,
                Update.counted >= number,
                Update.counted != Update.round,
            )
            return session.scalar(others.limit(1)) is not None

    def drop_later(self, number: int) -> None:
        """Lets updates that were to count after the round be over with it."""
        with self._transaction() as session:
            self._drop_later(session, number)

    def _drop_later(self, session: Session, number: int) -> None:
        later = (Update.cohort == self.cohort) & (Update.counted > number)
        session.execute(update(Update).where(later).values(counted=number))

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
        self.drop_file(dropped.file)
        return name

    def drop_file(self, file: str) -> None:
        """Removes the file of an update that counts nowhere, if that can be done."""
        with contextlib.suppress(OSError):
            (self.directory / file).unlink(missing_ok=True)

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

    def _kept(self, number: int, device: str, sha256: bytes) -> str:
        return f"{self._updates_of(number)}/{device}-{sha256.hex()}.safetensors"

    def _updates_of(self, number: int) -> str:
        return updates_directory(self.cohort, number)


@contextlib.contextmanager
def round_errors(path: Path) -> Iterator[None]:
    """`storage_errors`, but for a file that is gone: those of a round go with it."""
    gone: FileNotFoundError | None = None
    with storage_errors(path):
        try:
            yield
        except FileNotFoundError as error:
            gone = error
    if gone is not None:
        raise gone


def updates_directory(cohort: str, number: int) -> str:
    return f"{UPDATES}/{number}-{cohort}"
