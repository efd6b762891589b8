"""Where a bundle is written, and how it takes the place of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edge_runtime.bundle import MANIFEST
from edge_runtime.errors import StorageError

TOKENIZER_FILE = "tokenizer.json"
OUR_NAMES = {MANIFEST, TOKENIZER_FILE, "adapters", "onnx", "executorch"}  # of what a bundle holds


def places(out: Path, *, overwrite: bool) -> tuple[Path, Path, Path]:
    """Where a bundle goes, is written before that, and the one that it replaces is meanwhile.

    Raises:
        StorageError: `out` exists and `overwrite` is not set, or is no bundle, or cannot be
            replaced; or a directory beside it, `out` with `.partial` or `.old`, is in the way.
    """
    out = out.resolve()  # behind a link, the bundle is replaced and not the link
    if out.exists() and not overwrite:
        raise StorageError(f"{out} exists; give another --out, or --overwrite to replace it")
    if out.is_mount():
        raise StorageError(
            f"a file system is mounted at {out}, which cannot be replaced; give a directory in it"
        )
    staging, old = (out.with_name(out.name + end) for end in (".partial", ".old"))
    for path in (out, staging, old):
        _keep_what_is_not_ours(path)
    return out, staging, old


def replace(out: Path, by: Path, old: Path) -> None:
    """Puts the directory `by` in the place of `out`, if that is there; it is at `old` meanwhile."""
    shutil.rmtree(old, ignore_errors=True)
    if not out.exists():
        by.rename(out)
        return
    out.rename(old)
    try:
        by.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _keep_what_is_not_ours(path: Path) -> None:
    """
    Raises:
        StorageError: to delete `path` would lose what no export wrote: it is a file, or a directory
            with something in it that is no part of a bundle, whole or as a kill left it.
    """
    if not path.exists():
        return
    if not path.is_dir() or not _is_bundle(path):
        raise StorageError(
            f"{path} is no bundle, and would be deleted; choose another --out, or move it away"
        )
    for each in path.iterdir():
        if each.name not in OUR_NAMES:
            raise StorageError(
                f"{each} is no part of a bundle, and would be deleted; move it out of there, or "
                "choose another --out"
            )


def _is_bundle(directory: Path) -> bool:
    """Of any version; an export that was killed wrote the tokenizer first, and nothing before."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return (directory / TOKENIZER_FILE).is_file() or not any(directory.iterdir())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "format_version" in manifest
