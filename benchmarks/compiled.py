"""Bundles for a benchmark: compiled once, and found again while what made them stays the same."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import edge_runtime
import export
import protos
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.doctor import installed
from export.base import Base
from export.bundle import export_bundle
from export.mixture import Mixture
from export.tiers import Tier

LIBRARIES = ("torch", "onnxruntime", "executorch", "onnx", "transformers", "numpy")


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
        base = self.base.fingerprint
        made_from = (base, tier, engine, precision, mixture, programs, sources_digest())
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
    """Of all that decides about a bundle beside its base: the compiler with its data, what it has
    of the device's, and what both of them build on."""
    digest = hashlib.sha256()
    for package, pattern in ((export, "*"), (edge_runtime, "*.py"), (protos, "*.py")):
        root = Path(str(package.__file__)).parent
        for path in sorted(path for path in root.rglob(pattern) if path.is_file()):
            name = path.relative_to(root)
            if "__pycache__" not in name.parts and path.suffix != ".safetensors":
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{package.__name__}/{name} {content}\n".encode())
    for library in LIBRARIES:
        digest.update(f"{library} {installed(library)}\n".encode())
    return digest.hexdigest()
