"""Bundles for a benchmark: compiled once, and found again while the compiler stays the same."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import export
from edge_runtime.bundle import Bundle, open_bundle
from export.base import Base
from export.bundle import export_bundle
from export.mixture import Mixture
from export.tiers import Tier


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """Compiles into `folder`, or takes what an earlier run of the same compiler left there."""

    base: Base
    folder: Path
    progress: Callable[[str], None]

    def bundle(
        self,
        tier: Tier,
        *,
        engine: str,
        precision: str,
        mixture: Mixture | None = None,
        programs: Sequence[str] | None = None,
    ) -> Bundle:
        """The bundle of one engine."""
        mixture = mixture or Mixture()
        made_from = (self.base.sha256, tier, engine, precision, mixture, programs, sources_digest())
        name = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
        path = self.folder / f"{engine}-{precision}-{name}"
        if path.exists():
            return open_bundle(path)
        return export_bundle(
            self.base,
            mixture,
            tier,
            engines=[engine],
            precision=precision,
            out=path,
            programs=programs,
            progress=self.progress,
        )


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[Path]:
    """`folder`, made if need be, or else one that is gone afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="comigs-bench-") as temporary:
        yield Path(temporary)


def sources_digest() -> str:
    """Of the compiler's own code."""
    digest = hashlib.sha256()
    for path in sorted(Path(export.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
