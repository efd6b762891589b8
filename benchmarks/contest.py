"""Contestants that take turns: each in a process of its own, only one of them running at a time.

    with Contestant("ours", [sys.executable, "-m", "benchmarks.device_process", ...]) as ours:
        ours.ask("step")

A process that is not asked anything is stopped (SIGSTOP), so that no worker thread of it spins
while another one is timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil

from edge_runtime.connection import Closing
from edge_runtime.errors import BudgetError, ComigsError

ROOT = Path(__file__).parents[1]
WATCH_SECONDS = 0.02


class ContestError(ComigsError):
    """A contestant's process failed."""

    code = 1


class WrongOptionError(Exception):
    """An option of a benchmark that does not suit its base."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class Contestant(Closing):
    """A process that serves requests (see `child.py`).

    Args:
        limit: bytes of resident memory at which it is ended, as a phone ends an app. It is looked
            at every 20 ms, so that a short peak can pass.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> None:
        self.name, self.limit = name, limit
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - `close`
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment() | dict(environment or {}),
        )
        try:
            self._receive()
        except BaseException:
            self.close()
            raise
        self.loaded_seconds = time.perf_counter() - self.started
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, command: str, *arguments: Any) -> Any:
        """The answer to one request, while all other contestants stand still.

        Raises:
            ContestError: the process ended; says what it printed last.
            BudgetError: it needed more memory than `limit`.
        """
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # `_receive` says why it ended
            self._process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._receive()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        while self.limit and not select.select([self._process.stdout], [], [], WATCH_SECONDS)[0]:
            check_memory(self.name, self._process.pid, self.limit)
        line = self._process.stdout.readline()
        if self.limit:
            check_memory(self.name, self._process.pid, self.limit)
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()[-1:] or ["nothing"]
            raise ContestError(
                f"{self.name} ended with {self._process.returncode} and said: {said[0][:300]}"
            )
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()  # also one that stands still
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _environment() -> dict[str, str]:
    """This process's, with our packages found and kept as bytecode, as installed ones are."""
    own = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**own, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def check_memory(name: str, process: int, limit: int) -> None:
    """
    Raises:
        BudgetError: the process's resident set is larger than `limit` bytes.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        if psutil.Process(process).memory_info().rss > limit:
            raise BudgetError(f"{name} needs more than {limit // 2**20} MiB and was ended")


def turns(count: int, progress: Callable[[str], None], *, warm_up: int = 2) -> Iterator[bool]:
    """Yields, for each turn, whether it counts: the first ones warm up."""
    for turn in range(-warm_up, count):
        progress(f"turn {turn + 1} of {count}" if turn >= 0 else "warming up")
        yield turn >= 0


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile."""
    low, _, high = quantiles(values, n=4)
    return low, high
