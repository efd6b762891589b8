"""The audit log: who was let do what, and what was refused. Append-only, one JSON object a line.

* Every line holds the SHA-256 of the line before it, so that none can be altered, left out, moved
  or put in between without all later ones having to be written anew. Whoever can write the file can
  do just that, and can cut off its end: who notes the last hash elsewhere from time to time can
  tell whether it is still there.
* An administrator's act is in the log, on the disk, before it is carried out: none is without its
  entry. If it was refused or failed, another entry says so.
* Refusals follow within moments. Whoever is refused all the time cannot fill the disk: of each
  certificate's, and of all those without one together, MOST_REFUSALS in REFUSAL_SECONDS are written
  one by one, and of the rest their number.
* A kill may tear the last line. It was not acknowledged; the next start cuts it off and notes that.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import AuditError, StorageError
from edge_runtime.files import storage_errors, sync
from edge_runtime.finite import dumps

LOG = "audit.jsonl"
# What the first entry holds as the hash of the one before.
BEGINNING = "0" * 64
MOST_REFUSALS = 10
REFUSAL_SECONDS = 60.0
# Characters of what a caller may have chosen, such as a reason or a name.
LONGEST_TEXT = 500
# Who caused an entry, if no certificate says so.
COORDINATOR = "coordinator"
NOBODY = "nobody"
# Events that are noted beside acts and refusals: what they led to.
NOTED = {
    "budget_spent",
    "device_enrolled",
    "round_abandoned",
    "round_closed",
    "settings_changed",
    "update_damaged",
}


@dataclass(frozen=True)
class Entry:
    """One line."""

    number: int
    """From 1."""
    time: float
    """Seconds since the epoch."""
    event: str
    by: str
    """Id in the certificate of whoever caused it, NOBODY if there was none, or COORDINATOR."""
    fields: dict[str, Any]
    hash: str
    """SHA-256 of the line, hex."""


class AuditLog:
    """The log of one coordinator, which holds the lock of its state directory."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            AuditError: the last entry is none, so that nothing can follow it.
            StorageError: it cannot be read or written.
        """
        self.path = directory / LOG
        self._lock = threading.Lock()
        self._number, self._hash, self._size = 0, BEGINNING, 0
        self._doubtful = False  # whether something may follow that was not written whole
        with storage_errors(self.path):
            new = not self.path.exists()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            if new:
                sync(directory)
            torn = self._find_end()
        if torn:
            self.append([("torn_entry_removed", COORDINATOR, {"bytes": torn})])

    def close(self) -> None:
        os.close(self._file)

    @property
    def entries(self) -> int:
        """How many there are."""
        return self._number

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return self._hash

    def append(self, events: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Writes (event, by, fields) as one entry each; they are on the disk on return.

        Raises:
            StorageError: they are not; the log is as it was.
        """
        with self._lock, storage_errors(self.path):
            number, digest = self._number, self._hash
            lines = []
            for event, by, fields in events:
                number += 1
                line = _line(number, event, by, fields, digest)
                digest = hashlib.sha256(line).hexdigest()
                lines.append(line + b"\n")
            self._take_back()
            try:
                self._doubtful = True
                _write(self._file, b"".join(lines))
                os.fsync(self._file)
            except OSError:
                self._take_back()
                raise
            self._doubtful = False
            self._size += sum(map(len, lines))
            self._number, self._hash = number, digest

    def _take_back(self) -> None:
        """What was written of entries that failed, if need be when the disk works again."""
        if self._doubtful:
            os.ftruncate(self._file, self._size)
            self._doubtful = False

    def _find_end(self) -> int:
        """Goes to the end of the last whole line. Returns how many bytes after it were cut off."""
        size = os.fstat(self._file).st_size
        content = _tail(self._file, size)
        whole = content.rfind(b"\n") + 1
        torn = len(content) - whole
        if torn:
            os.ftruncate(self._file, size - torn)
            os.fsync(self._file)
        self._size = size - torn
        if self._size:
            line = content[:whole].splitlines()[-1]
            try:
                self._number = int(json.loads(line)["entry"])
            except (ValueError, KeyError, TypeError) as error:
                raise AuditError(
                    f"the last line of {self.path} is no entry of an audit log, so nothing can "
                    "follow it; keep the file, under another name, and find out who wrote that"
                ) from error
            self._hash = hashlib.sha256(line).hexdigest()
        return torn


class Auditor:
    """Writes to the log from an event loop, without its waiting for the disk."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit")
        self._lock = threading.Lock()
        self._pending: list[tuple[str, str, dict[str, Any]]] = []
        self._window = 0.0
        self._refusals: dict[str, int] = {}

    def close(self) -> None:
        """Writes what is left.

        Raises:
            StorageError: it cannot.
        """
        with self._lock:
            self._begin_window()
        last = self._writer.submit(self._flush)
        self._writer.shutdown()
        last.result()

    def refused(self, event: str, by: str, fields: dict[str, Any]) -> None:
        """Notes a refusal. It is on the disk a moment later."""
        with self._lock:
            if time.monotonic() >= self._window + REFUSAL_SECONDS:
                self._begin_window()
            count = self._refusals.get(by, 0)
            self._refusals[by] = count + 1
            if count >= MOST_REFUSALS:
                return
            self._pending.append((event, by, fields))
        self._writer.submit(self._flush_what_can_be)

    def note(self, event: str, by: str, fields: dict[str, Any]) -> None:
        """Notes what has happened. It is on the disk a moment later."""
        with self._lock:
            self._pending.append((event, by, fields))
        self._writer.submit(self._flush_what_can_be)

    def observe(self, event: str, fields: dict[str, Any]) -> None:
        """Takes the coordinator's events: notes those of NOTED, and what was refused."""
        if event in NOTED:
            self.note(event, fields.get("certificate") or COORDINATOR, _without_certificate(fields))
        elif event in ("update_refused", "shares_refused"):
            by = fields.get("certificate") or NOBODY
            self.refused(event, by, _without_certificate(fields))

    def record(self, event: str, by: str, fields: dict[str, Any]) -> Future[None]:
        """Notes what is about to happen; it is on the disk once the result is there.

        The result raises StorageError if it could not be written: it must not happen then.
        """
        return self._writer.submit(self._flush, (event, by, fields))

    def _begin_window(self) -> None:
        """Notes how many refusals were left out, and counts anew."""
        for by, count in self._refusals.items():
            if count > MOST_REFUSALS:
                left_out = {"refusals": count - MOST_REFUSALS, "seconds": REFUSAL_SECONDS}
                self._pending.append(("more_refused", by, left_out))
        self._refusals.clear()
        self._window = time.monotonic()

    def _flush(self, *more: tuple[str, str, dict[str, Any]]) -> None:
        """Writes what is pending, and `more`. What cannot be written stays pending, `more` not."""
        with self._lock:
            pending, self._pending = self._pending, []
        if not pending and not more:
            return
        try:
            self._log.append([*pending, *more])
        except StorageError:
            with self._lock:
                self._pending = pending + self._pending
            raise

    def _flush_what_can_be(self) -> None:
        with contextlib.suppress(StorageError):  # it stays pending
            self._flush()


def read(path: Path) -> Iterator[Entry]:
    """The entries of the log at `path`, which may be written meanwhile; without a torn last one.

    Raises:
        AuditError: the chain is broken; says at which entry. Those before it were returned.
        StorageError: the file cannot be read.
    """
    number, digest = 0, BEGINNING
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                number += 1
                entry = _entry(path, number, line[:-1], digest)
                digest = entry.hash
                yield entry
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def missing(path: Path, digest: str) -> AuditError:
    """The chain holds, but not what it held earlier."""
    return AuditError(
        f"{path} holds no entry with the hash {digest}: its end was cut off, or it was written "
        "anew; compare it with a copy"
    )


def text(entry: Entry) -> str:
    """The entry as a line for people. What callers may have chosen is quoted."""
    moment = datetime.datetime.fromtimestamp(entry.time).strftime("%Y-%m-%d %H:%M:%S")
    fields = (f"{name}={json.dumps(v, ensure_ascii=False)}" for name, v in entry.fields.items())
    return " ".join([f"{entry.number:>5}  {moment}  {entry.event:<16} by {entry.by}", *fields])


def _entry(path: Path, number: int, line: bytes, previous: str) -> Entry:
    """
    Raises:
        AuditError: `line` is not entry `number` after one with the hash `previous`.
    """
    try:
        content = json.loads(line)
        claimed = (content.pop("entry"), content.pop("previous"))
        entry = Entry(
            number=number,
            time=float(content.pop("time")),
            event=str(content.pop("event")),
            by=str(content.pop("by")),
            fields=content,
            hash=hashlib.sha256(line).hexdigest(),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, number, "that line is no entry") from error
    if claimed[1] != previous:
        raise _broken(
            path,
            number,
            "it does not follow the line before it, so that one was altered, or lines between the "
            "two were taken out or put in",
        )
    if claimed[0] != number:
        raise _broken(path, number, f"it says that it is entry {claimed[0]}")
    return entry


def _broken(path: Path, number: int, how: str) -> AuditError:
    return AuditError(
        f"the chain of {path} is broken at entry {number}: {how}; trust the entries before "
        f"{max(1, number - 1)}, and compare the rest with a copy"
    )


def _line(number: int, event: str, by: str, fields: dict[str, Any], previous: str) -> bytes:
    entry = {"entry": number, "time": round(time.time(), 3), "event": event, "by": by}
    entry |= {name: _short(value) for name, value in fields.items() if name not in entry}
    entry["previous"] = previous
    text = dumps(entry, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")


def _without_certificate(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "certificate"}


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return value[:LONGEST_TEXT] + "..."
    return value


def _write(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]


def _tail(file: int, size: int, step: int = 65536) -> bytes:
    """The end of `file`, from before its last whole line."""
    start = size
    content = b""
    while start > 0 and content.count(b"\n") < 2:
        start = max(0, start - step)
        content = os.pread(file, size - start, start)
    return content
