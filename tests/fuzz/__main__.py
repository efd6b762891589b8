"""Coverage-guided fuzzing of one target (targets.py) with atheris, in this process.

    python -m tests.fuzz TARGET --runs 100000

libFuzzer ends it with an error at the first crash, at an input that takes more than 10 seconds, or
when it needs more than 2 GiB; what found it is written to the working directory. New inputs that
reach new code go into --corpus. The corpus that is kept, tests/fuzz/corpus, is read only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KEPT = Path(__file__).parent / "corpus"
MEMORY = Path("/dev/shm")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--corpus", type=Path, help="where to put new inputs; nowhere by default")
    arguments = parser.parse_args()
    # libFuzzer ends its process at once, so another one tidies up.
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
        corpus = arguments.corpus or Path(scratch, "corpus")
        corpus.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", "from tests.fuzz.__main__ import fuzz; fuzz()"]
        options = [arguments.target, f"-runs={arguments.runs}", str(corpus)]
        environment = os.environ | {"TMPDIR": scratch}
        return subprocess.run([*command, *options], env=environment, check=False).returncode


def fuzz() -> None:
    """In a process of its own: `fuzz TARGET -runs=N CORPUS`."""
    import atheris

    with atheris.instrument_imports(include=["edge_runtime", "coordinator"]):
        from tests.fuzz.targets import SCRATCH, TARGETS, seeds

    target, runs, corpus = sys.argv[1:]
    folders = [corpus, str(SCRATCH / "seeds")]
    (SCRATCH / "seeds").mkdir()
    for number, seed in enumerate(seeds()[target]):
        (SCRATCH / "seeds" / str(number)).write_bytes(seed)
    if (KEPT / target).is_dir():
        folders.append(str(KEPT / target))
    options = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], runs, *options, *folders], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
