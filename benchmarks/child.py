"""One contestant of a benchmark: a process that does what it is asked, one line at a time.

Standard library only, so that a peer's process, in an environment of its own, can import it. The
parent's side is `contest.py`. A request is a JSON list, the command and its arguments; the answer
is one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
Commands = Mapping[str, Callable[..., Any]]


def serve(load: Callable[[], Commands]) -> None:
    """Loads, says so, and answers requests until the parent hangs up.

    Besides what `load` returns there is `peak`: the largest resident set so far, in MiB.
    """
    # A process that stands still does not see that its parent was killed, and would stay.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries print what they like; only answers may go to the parent.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    commands = {"peak": peak_mib, **load()}
    answer("ready")
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer(commands[name](*arguments))


def peak_mib() -> float:
    """Largest resident set that this process has had, in MiB, its mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def prompt(length: int, vocabulary: int) -> list[int]:
    """The same pseudo-random tokens in every process: a linear congruential generator's."""
    state, tokens = 12345, []
    for _ in range(length):
        state = (1103515245 * state + 12345) % 2**31
        tokens.append((state >> 8) % vocabulary)
    return tokens
