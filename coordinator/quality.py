"""A held-out quality gate: a candidate generalist that got worse on the operator's text is refused.

What is measured is `comigs perplexity`: the generalist with the bundle's fresh specialists and
router, as a device has it that has just joined. It runs in a process of its own. So the coordinator
needs no engine where there is no gate, never holds the base's weights, and outlives an engine that
the system kills.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_runtime import errors
from edge_runtime.errors import ComigsError

# One that hangs would keep its round from ever being closed.
MOST_SECONDS = 3600.0


@dataclass(frozen=True)
class Quality:
    """Perplexities on the held-out text, of what a round started from and of what came of it."""

    incoming: float
    candidate: float


@dataclass(frozen=True)
class QualityGate:
    """Compares generalists of one bundle on one text."""

    bundle: Path
    text: Path
    """A file, or a directory of files."""
    tolerance: float
    """By which share the candidate's perplexity may be above the incoming one's."""

    def __str__(self) -> str:
        return f"{self.text}, up to {self.tolerance:.3%} worse"

    async def check(self, incoming: Path | None) -> float:
        """The perplexity of the generalist in the file `incoming`; None: the bundle's own.

        Raises:
            ComigsError: as `comigs perplexity` does: no engine, no text, no usable bundle ...
        """
        (measured,) = await self._measure(*([] if incoming is None else [incoming]))
        return measured

    async def compare(self, incoming: Path, candidate: bytes) -> Quality:
        """Measures both in one process, the candidate from its payload; raises as `check` does, if
        a second attempt fails, too: all updates of a round would be lost with a passing trouble."""
        try:
            before, after = await self._measure(incoming, Path("-"), payload=candidate)
        except ComigsError:
            before, after = await self._measure(incoming, Path("-"), payload=candidate)
        return Quality(incoming=before, candidate=after)

    def objection(self, quality: Quality) -> str | None:
        """Why the candidate is refused, None if it is not."""
        most = quality.incoming * (1 + self.tolerance)
        if math.isfinite(quality.candidate) and quality.candidate <= most:
            return None
        return (
            f"the quality gate refused what came of it: perplexity {quality.candidate:.2f} where "
            f"the incoming generalist has {quality.incoming:.2f}"
        )

    async def _measure(self, *generalists: Path, payload: bytes = b"") -> list[float]:
        command = [sys.executable, "-m", "edge_runtime", "perplexity", *map(str, generalists)]
        options = ["--bundle", str(self.bundle), "--text", str(self.text), "--format", "json"]
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, *options, stdin=pipe, stdout=pipe, stderr=pipe
            )
        except OSError as error:
            raise ComigsError(
                f"--quality-gate: the measurement cannot be started: {error.strerror}"
            ) from error
        try:
            async with asyncio.timeout(MOST_SECONDS):
                output, complaint = await process.communicate(payload)
        except TimeoutError as error:
            raise ComigsError(
                f"--quality-gate: the measurement took longer than {MOST_SECONDS:.0f} seconds; "
                "give it less text"
            ) from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            raise _error(process.returncode, complaint.decode(errors="replace"))
        found = [entry["perplexity"] for entry in json.loads(output)["generalists"]]
        return [math.inf if value is None else value for value in found]


def _error(code: int, complaint: str) -> ComigsError:
    """What the process ended with, as the error that it was there."""
    lines = complaint.strip().splitlines() or [""]
    text = f"--quality-gate: {lines[-1].removeprefix('error: ')}"
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, ComigsError) and kind.code == code > 1:
            return kind(text)
    return ComigsError(f"--quality-gate: the measurement ended with code {code}: {lines[-1]}")
