"""Files past the page cache: what is in them, and what is not in memory."""

import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import direct

O_DIRECT = os.O_DIRECT
CONTENT = os.urandom(3 * direct.PIECE_BYTES)
# Around what blocks and pieces end at, and anything else.
LENGTHS = st.integers(0, 3 * direct.BLOCK) | st.sampled_from(
    [direct.PIECE_BYTES - 1, direct.PIECE_BYTES, direct.PIECE_BYTES + 1]
)


def append(path: Path, content: bytes, lengths: list[int], settled: int) -> int:
    """Appends pieces of those lengths, and settles after the first `settled` and at the end.

    Returns:
        How many bytes there were.
    """
    before = path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        appending = direct.Appending(file)
        assert file.tell() == 0, "what is known is read from there"
        written = 0
        for index, length in enumerate(lengths):
            piece = memoryview(content)[written : written + length]
            appending.write([piece])
            written += len(piece)
            if index == settled:
                appending.settle()
                assert path.stat().st_size == before + written
        appending.settle()
        appending.close()
    return written


def ordinary_only(transfer: Callable[..., int]) -> Callable[..., int]:
    """`transfer` as on a file system that opens files for direct transfers and refuses them."""

    def call(descriptor: int, *arguments: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return transfer(descriptor, *arguments)

    return call


@pytest.mark.parametrize("kind", ["direct", "not opened", "refused"])
@settings(max_examples=25, deadline=None)
@given(first=st.lists(LENGTHS, max_size=3), then=st.lists(LENGTHS, max_size=3), data=st.data())
def test_what_was_appended_is_there(
    kind: str, first: list[int], then: list[int], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        if kind == "not opened":
            patched.setattr(os, "O_DIRECT", os.O_DIRECTORY)
        if kind == "refused":
            patched.setattr(os, "pwrite", ordinary_only(os.pwrite))
            patched.setattr(os, "preadv", ordinary_only(os.preadv))
        path = Path(folder) / "file"
        path.touch()
        size = append(path, CONTENT, first, data.draw(st.integers(0, 3)))
        assert path.read_bytes() == CONTENT[:size]
        # As after a break.
        rest = append(path, CONTENT[size:], then, data.draw(st.integers(0, 3)))
        assert path.read_bytes() == CONTENT[: size + rest]
        with direct.opened(path) as descriptor:
            for _ in range(5):
                start = data.draw(st.integers(0, size + rest + 10))
                length = data.draw(st.integers(0, 3 * direct.BLOCK))
                there = CONTENT[: size + rest][start : start + length]
                assert direct.read(descriptor, start, length) == there


def test_what_is_written_and_read_takes_no_memory_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "file"
    if not transfers_directly(path):
        pytest.skip("this file system has no direct transfers, or is memory itself")
    path.write_bytes(b"")
    append(path, CONTENT, [len(CONTENT) - 100], 0)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with direct.opened(path) as descriptor:
        for start in range(0, len(CONTENT), direct.BLOCK * 100):
            direct.read(descriptor, start, direct.BLOCK * 100)
    assert resident(path) <= 1, "but for the end, which fills no block"


def transfers_directly(path: Path) -> bool:
    """Whether a block that is written to `path` so does not stay in memory."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:
        return False
    try:
        os.pwrite(descriptor, mmap.mmap(-1, direct.BLOCK), 0)
        return resident(path) == 0
    except OSError:
        return False
    finally:
        os.close(descriptor)


def resident(path: Path) -> int:
    """How many pages of a file are in memory."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        size = ctypes.c_size_t(len(mapped))
        assert libc.mincore(ctypes.byref(begin), size, pages) == 0, os.strerror(ctypes.get_errno())
        del begin
    return sum(page & 1 for page in pages)
