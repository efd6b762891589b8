"""Files, and directories, that are either wholly there or not there at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import StorageError

# However much space is free.
NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}

# What files end with that are being written; nobody else's do.
UNFINISHED = ".comigs-tmp"


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns an OSError while writing `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        mend = "free some space or choose" if error.errno not in NOT_ALLOWED else "choose"
        raise StorageError(
            f"cannot write {path}: {error.strerror}; {mend} another directory, then start again: "
            "what was saved before is intact"
        ) from error


def check_readable(path: Path) -> None:
    """Whoever is not let at a file has not lost it.

    Raises:
        StorageError: it is there, and cannot be read.
    """
    try:
        with path.open("rb"):
            pass
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        pass
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror}; let this user read it: nothing says that it is "
            "damaged"
        ) from error


@contextlib.contextmanager
def removed_on_failure(directory: Path) -> Iterator[None]:
    """Around what makes `directory`: there is nothing in the way when it is tried again."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`, durable when it returns.

    A crash at any moment leaves the old content or the new one.

    Raises:
        StorageError: the disk is full or not writable; the old content is intact.
    """
    with storage_errors(path):
        make_directory(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            replace_durably(Path(name), path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


def make_directory(path: Path) -> None:
    """Makes a directory, and those above it, if it is not there; durable when it returns.

    Raises:
        OSError: as `Path.mkdir` and `os.fsync`.
    """
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def replace_durably(source: Path, path: Path) -> None:
    """Moves the written file `source` to `path`; content and name are durable when it returns.

    Raises:
        OSError: as `os.fsync` and `os.replace`.
    """
    sync(source)
    os.replace(source, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when a file's content, or the names in a directory, are durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(directory: Path) -> None:
    """Deletes what an interrupted `write_atomic` left in `directory`."""
    for path in directory.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)
