"""Events on stdout, a line each, without ever waiting for whoever reads them."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TextIO

# Lines that wait for a reader, and bytes for a disk; more are left out and counted.
MOST_LINES = 10_000
MOST_BYTES = 2**20
# How long the end waits for a reader.
PATIENCE_SECONDS = 2.0
# What passes: the disk is full, or the reader slow.
FOR_NOW = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN}


class EventLog:
    """Call it with an event and its fields; any thread may."""

    def __init__(self, stream: TextIO | None, line: Callable[[str, dict[str, Any]], str]) -> None:
        """
        Args:
            stream: a file; None: nobody reads.
            line: how an event reads.
        """
        self._line = line
        self._encoding = stream.encoding if stream is not None else "utf-8"
        # Not through the stream: a thread that waits in it would keep the program from ending.
        self._file = stream.fileno() if stream is not None else None
        self._lines: queue.Queue[bytes | None] = queue.Queue(MOST_LINES)
        self._pending = b""
        self._lock = threading.Lock()
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="event log", daemon=True)
        self._thread.start()

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        with self._lock:
            if self._lost and self._put("lines_lost", {"lines": self._lost}):
                self._lost = 0
            if not self._put(event, fields):
                self._lost += 1

    def close(self) -> None:
        """What has been said is written when it returns, unless nobody reads."""
        try:
            self._lines.put(None, timeout=PATIENCE_SECONDS)
        except queue.Full:
            return
        self._thread.join(PATIENCE_SECONDS)

    def _put(self, event: str, fields: dict[str, Any]) -> bool:
        line = self._line(event, fields) + "\n"
        try:
            self._lines.put_nowait(line.encode(self._encoding, "backslashreplace"))
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
        self._write(b"")

    def _write(self, line: bytes) -> None:
        """On a full disk later, with the next line that fits; a line is written whole, or not."""
        if self._file is None:
            return
        if len(self._pending) + len(line) > MOST_BYTES:
            with self._lock:
                self._lost += 1
        else:
            self._pending += line
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
        except OSError as error:
            if error.errno not in FOR_NOW:
                self._pending = b""
