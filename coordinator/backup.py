"""`comigs backup` and `comigs restore`: one file that holds what a coordinator cannot lose.

A backup is a tar file of the state directory without the devices' updates: a copy of the database
as it was at one moment, the generalists and the server optimizers' memory that it names, the
authority's key and certificate, and the audit log. The copy is SQLite's online backup, or the rows
of a PostgreSQL database in a SQLite file. Its last member, MANIFEST, has the SHA-256 of every other
one, so that a backup which is cut off has none. Generalists are written before the rows that name
them and never altered; if a file that is needed vanishes meanwhile, since its round ended, the
backup starts again.

What a restored coordinator cannot know is what happened after the backup. See `State.begin_anew`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from coordinator import rows
from coordinator.audit import COORDINATOR, LOG, AuditLog
from coordinator.database import damaged, is_damage, postgres_engine, read_only
from coordinator.state import DATABASE, GENERALISTS, MEMORIES, State
from coordinator.tables import SCHEMA
from coordinator.tls import ADMIN_FILE, CA_FILE, CA_KEY_FILE
from edge_runtime.errors import BackupError, StorageError, VersionError
from edge_runtime.files import storage_errors, sync

FORMAT = 1
MANIFEST = "backup.json"
# Beside the database. Earlier backups may be there, too. Not the administrator's file: it may have
# been replaced since, and whoever has the old one would be the administrator again.
KEPT = {CA_FILE, CA_KEY_FILE, LOG}
# Rounds end seldom compared with the time that a backup takes.
ATTEMPTS = 10
LOST_AND_FOUND = "lost+found"  # in the root of a file system, where a volume is mounted


@dataclass(frozen=True)
class Summary:
    """What a backup holds."""

    made_at: str
    """Date and time (ISO 8601, UTC)."""
    files: int
    bytes: int


class _ChangedError(Exception):
    """A file that the database names has vanished since it was copied."""


def back_up(state: Path, out: Path, url: str | None = None) -> Summary:
    """Writes a backup of the state directory `state`, whose coordinator may be running, to `out`.

    Only its owner can read it: it holds the authority's key.

    Args:
        url: of the PostgreSQL database with the rows, if there is one.

    Raises:
        ValueError: there is no coordinator's state.
        StorageError: `out` exists, or something cannot be read or written; it is as it was then.
        VersionError: another version of the program made it.
    """
    if not (state / (GENERALISTS if url else DATABASE)).exists():
        raise _none_in(state)
    if out.exists():
        raise StorageError(f"{out} exists; choose another name, or move it away")
    with storage_errors(out):  # a directory that is not there may be mistyped
        directory = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    missing = ""
    try:
        for _ in range(ATTEMPTS):
            with storage_errors(out):
                (directory / DATABASE).unlink(missing_ok=True)
                if url:
                    rows.from_postgres(url, directory / DATABASE)
                else:
                    _copy_database(state / DATABASE, directory / DATABASE)
                    _check_database(state, directory / DATABASE)
                try:
                    summary = _write(state, directory / DATABASE, directory / "backup.tar")
                except _ChangedError as error:
                    missing = str(error)
                    continue
                os.replace(directory / "backup.tar", out)
                sync(out.parent)
                return summary
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    raise StorageError(
        f"rounds ended while {state} was copied, {ATTEMPTS} times in a row, and {missing} was "
        "gone; pause the rounds, or stop the coordinator, and try again; or give the --state that "
        "belongs to the database"
    )


def restore(file: Path, state: Path, url: str | None = None) -> Summary:
    """Makes the state directory `state` out of a backup.

    Args:
        url: of an empty PostgreSQL database for the rows; None: SQLite, in `state`.

    Raises:
        ValueError: `url` is no address of a PostgreSQL database, or that is not empty.
        BackupError: `file` is no backup, is damaged, or is of another version of comigs.
        StorageError: `state` exists and is not empty, or cannot be written; it is as it was then.
    """
    there = state.exists()
    if there and (not state.is_dir() or any(p.name != LOST_AND_FOUND for p in state.iterdir())):
        raise StorageError(f"{state} is not empty; give a directory that is, or one to be made")
    if url is not None:
        postgres_engine(url).dispose()  # raises
    with storage_errors(state):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In it, not beside it: it may be a mount point, or its parent be somebody else's.
        directory = Path(tempfile.mkdtemp(dir=state, prefix=".restored."))
        try:
            summary = _extract(file, directory)
            _begin_anew(file, directory, summary)
            _move(directory, state, url)
        except BaseException:
            for path in state.iterdir():
                if path.name != LOST_AND_FOUND:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not there:
                state.rmdir()
            raise
        shutil.rmtree(directory, ignore_errors=True)
    return summary


def _move(directory: Path, state: Path, url: str | None) -> None:
    """Puts what was restored in its place; last what makes it a coordinator's state: the rows."""
    owner = state.stat()
    for path in sorted(directory.rglob("*")):
        if os.geteuid() == 0:  # on behalf of whoever the directory is of, as of a service
            os.chown(path, owner.st_uid, owner.st_gid)
        sync(path)
    for path in directory.iterdir():
        if path.name != DATABASE:
            path.rename(state / path.name)
    sync(state)
    sync(state.parent)
    if url:
        rows.to_postgres(directory / DATABASE, url)
    else:
        (directory / DATABASE).rename(state / DATABASE)
        sync(state)


def _copy_database(source: Path, target: Path) -> None:
    """Into one file, without a write-ahead log beside it."""
    try:
        with (
            contextlib.closing(sqlite3.connect(read_only(source), uri=True)) as running,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            running.backup(copy)
            copy.execute("pragma journal_mode=delete")
    except sqlite3.Error as error:
        if is_damage(error):
            raise damaged(source, str(error)) from error
        raise StorageError(f"cannot copy {source}: {error}; nothing was backed up") from error


def _check_database(state: Path, copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        (schema,) = connection.execute("pragma user_version").fetchone()
        tables = connection.execute("select name from sqlite_master where name = 'rounds'")
        if not tables.fetchone():
            raise _none_in(state)
    if schema != SCHEMA:
        raise VersionError(
            f"{state / DATABASE} was made by another version of comigs; back it up with that one"
        )


def _none_in(state: Path) -> ValueError:
    return ValueError(
        f"{state} holds no state of a coordinator; give what `comigs serve` has, --database too if "
        "it has one"
    )


def _write(state: Path, database: Path, out: Path) -> Summary:
    """
    Raises:
        _ChangedError: what the database names is not there any more.
    """
    made_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    files: dict[str, dict[str, Any]] = {}
    with out.open("wb") as raw, tarfile.open(fileobj=raw, mode="w") as archive:
        os.fchmod(raw.fileno(), 0o600)
        for name, path in _contents(state, database):
            try:
                opened = path.open("rb")
            except FileNotFoundError as error:
                raise _ChangedError(name) from error
            with opened:
                # The audit log may grow meanwhile: as much of it as there is now.
                size = os.fstat(opened.fileno()).st_size
                digest = _add(archive, name, opened, size)
                files[name] = {"size": size, "sha256": digest}
        manifest = {"format": FORMAT, "schema": SCHEMA, "made_at": made_at, "files": files}
        content = json.dumps(manifest).encode()
        _add(archive, MANIFEST, io.BytesIO(content), len(content))
        archive.close()
        raw.flush()
        os.fsync(raw.fileno())
    return Summary(made_at=made_at, files=len(files), bytes=sum(f["size"] for f in files.values()))


def _contents(state: Path, database: Path) -> Iterator[tuple[str, Path]]:
    """Name in the backup and path of each file."""
    yield DATABASE, database
    for path in sorted(state.iterdir()):
        if path.name in KEPT and path.is_file():
            yield path.name, path
    with contextlib.closing(sqlite3.connect(database)) as connection:
        ongoing = "status in ('waiting', 'open')"
        needed = set()
        for column in ("generalist_file", "memory_file"):
            query = f"select {column} from rounds where {ongoing}"  # noqa: S608
            needed |= {row[0] for row in connection.execute(query) if row[0]}
        named = {row[0] for row in connection.execute("select generalist_file from rounds")}
    # Generalists of earlier rounds may have been deleted.
    for name in sorted(needed | {name for name in named if (state / name).exists()}):
        yield name, state / name


class _Hashed:
    """A file whose content is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        piece = self._file.read(size)
        self.digest.update(piece)
        return piece


def _add(archive: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> str:
    """Adds the first `size` bytes of `file`. Returns their SHA-256 (hex)."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(time.time())
    hashed = _Hashed(file)
    archive.addfile(member, hashed)
    return hashed.digest.hexdigest()


def _extract(file: Path, directory: Path) -> Summary:
    """
    Raises:
        BackupError: `file` is no backup, or damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    manifest: dict[str, Any] | None = None
    try:
        with tarfile.open(file, mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is None or not _is_ours(member.name):
                    raise BackupError(f"{file} holds {member.name}, which no backup does")
                if member.name == MANIFEST:
                    manifest = json.loads(content.read())
                    continue
                path = directory / member.name
                path.parent.mkdir(mode=0o700, exist_ok=True)
                hashed = _Hashed(content)
                with open(path, "xb", opener=_private) as out:
                    shutil.copyfileobj(hashed, out)
                digest = hashed.digest.hexdigest()
                found[member.name] = {"size": path.stat().st_size, "sha256": digest}
        if manifest is None:
            raise BackupError(f"{file} is cut off, or no backup; take another one")
        if (manifest["format"], manifest["schema"]) != (FORMAT, SCHEMA):
            raise BackupError(f"{file} was made by another version of comigs; restore it with that")
        listed, made_at = manifest["files"], str(manifest["made_at"])
        if not isinstance(listed, dict) or DATABASE not in listed:
            raise TypeError(f"it lists no {DATABASE}")
    except FileNotFoundError as error:
        raise BackupError(f"there is no {file}; check the path") from error
    except (IsADirectoryError, PermissionError) as error:
        raise BackupError(f"{file} cannot be read: {error.strerror}; check the path") from error
    except (tarfile.TarError, ValueError, KeyError, TypeError, EOFError) as error:
        raise BackupError(f"{file} is damaged, or no backup ({error}); take another one") from error
    for name in sorted(found.keys() | listed.keys()):
        if found.get(name) != listed.get(name):
            raise BackupError(f"{file} is damaged: {name} is not what it was; take another one")
    size = sum(entry["size"] for entry in found.values())
    return Summary(made_at=made_at, files=len(found), bytes=size)


def _is_ours(name: str) -> bool:
    """Whether `back_up` can have written a member of this name."""
    parts = PurePosixPath(name).parts
    folders = parts[:-1]
    return folders in ((), (GENERALISTS,), (MEMORIES,)) and ".." not in parts and "/" not in parts


def _begin_anew(file: Path, directory: Path, summary: Summary) -> None:
    """Makes what was extracted the beginning of another history."""
    try:
        with contextlib.closing(State(directory)) as restored:
            restored.begin_anew()
    except (StorageError, VersionError) as error:
        raise BackupError(f"{file} cannot be used: {error}") from error
    (directory / ADMIN_FILE).unlink(missing_ok=True)  # of backups that were made earlier
    if (directory / LOG).exists():
        with contextlib.closing(AuditLog(directory)) as log:
            log.append([("restored", COORDINATOR, {"made_at": summary.made_at})])


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
