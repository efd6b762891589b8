"""What all peers share: the command line, and greedy decoding with a step function.

    python -m benchmarks.peers.NAME convert MODEL OUT WEIGHTS
    python -m benchmarks.peers.NAME run     OUT WEIGHTS THREADS CONTEXT

`MODEL` is a GPT-2 as transformers saves it. `convert` writes what the peer loads, once; `run`
serves `prefill`, `decode` and `about` (see `child.py`), and is what is timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from benchmarks.child import Commands, prompt, serve

Convert = Callable[[Path, Path, str], None]


class Load(Protocol):
    """Loads what `convert` wrote."""

    def __call__(self, path: Path, weights: str, threads: int, context: int) -> Commands: ...


def main(package: str, settings: str, convert: Convert, load: Load) -> None:
    what, *given = sys.argv[1:]
    if what == "convert":
        model, out, weights = given
        Path(out).mkdir(parents=True, exist_ok=True)
        convert(Path(model), Path(out), weights)
        return
    path, weights, threads, context = given
    about = {"package": package, "version": version(package), "settings": settings}
    serve(lambda: {"about": lambda: about, **load(Path(path), weights, int(threads), int(context))})


def greedy(
    step: Callable[[list[int]], int], reset: Callable[[], None], vocabulary: int
) -> Commands:
    """`prefill` and `decode` of a peer that takes tokens and says the most probable next one."""
    last: list[int] = []

    def next_token(tokens: list[int]) -> float:
        started = time.perf_counter()
        last[:] = [step(tokens)]
        return time.perf_counter() - started

    def prefill(tokens: int) -> tuple[float, int]:
        reset()
        return next_token(prompt(tokens, vocabulary)), last[0]

    def decode(tokens: int) -> tuple[list[float], list[int]]:
        seconds, chosen = [], []
        for _ in range(tokens):
            seconds.append(next_token(list(last)))
            chosen += last
        return seconds, chosen

    return {"prefill": prefill, "decode": decode}


def config(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "config.json").read_text())
    return found
