"""Coverage-guided fuzzing of one target (targets.py) with atheris, in this process.

    python -m tests.fuzz TARGET --runs 100000

libFuzzer ends it with an error at the first crash, at an input that takes more than 10 seconds, or
when it needs more than 2 GiB; what found it is written to the working directory. New inputs that
reach new code go into --corpus. The corpus that is kept, tests/fuzz/corpus, is read only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge_runtime", "coordinator"]):
    from tests.fuzz.targets import SCRATCH, TARGETS, seeds

KEPT = Path(__file__).parent / "corpus"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--corpus", type=Path, help="where to put new inputs; nowhere by default")
    arguments = parser.parse_args()
    corpus = arguments.corpus or Path(tempfile.mkdtemp(dir=SCRATCH))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()[arguments.target]):
        (SCRATCH / "seeds").mkdir(exist_ok=True)
        (SCRATCH / "seeds" / str(number)).write_bytes(seed)
    folders = [corpus, SCRATCH / "seeds"]
    if (KEPT / arguments.target).is_dir():
        folders.append(KEPT / arguments.target)
    options = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1"]
    atheris.Setup(
        [sys.argv[0], f"-runs={arguments.runs}", *options, *map(str, folders)],
        TARGETS[arguments.target],
    )
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
