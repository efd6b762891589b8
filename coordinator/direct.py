"""Files that are written once and read once, past the system's page cache.

A round's updates are gigabytes that nobody looks at until it closes. In the page cache they would
take the memory that the machine has for others, and a virtual machine has to be given that memory
first, page by page, which took longer than all else that is done with an update. Where a file
system has no such way (O_DIRECT of open(2)), or refuses a transfer, these are ordinary files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

# What position, length and memory of a direct transfer are multiples of.
BLOCK = 4096
# At most so much is transferred at once.
PIECE_BYTES = 1024**2

_local = threading.local()


def _buffer() -> memoryview:
    """Memory of this thread, PIECE_BYTES long and where a direct transfer may begin."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(mmap.mmap(-1, PIECE_BYTES))
    buffer: memoryview = _local.buffer
    return buffer


@contextlib.contextmanager
def opened(path: Path, *, directly: bool = True) -> Iterator[int]:
    """The descriptor of a file to `read` from.

    Args:
        directly: past the page cache, where that is possible. Small pieces are better read through
            it, since of a block it keeps what comes next.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = _open(path, os.O_RDONLY) if directly else os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    with contextlib.suppress(OSError):  # if that is not why, the other way fails, too
        return os.open(path, flags | os.O_DIRECT)
    return os.open(path, flags)


def _transfer(call: Callable[[], int], descriptor: int) -> int:
    """What `call` gives; if a direct transfer is refused, as that of an ordinary file."""
    try:
        return call()
    except OSError as error:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return call()


def read(descriptor: int, start: int, size: int) -> memoryview:
    """Bytes of a file that is `opened`, fewer where it ends.

    They are valid until the next transfer of this thread.

    Args:
        size: at most PIECE_BYTES - 2 * BLOCK.
    """
    first = start // BLOCK * BLOCK
    stop = -(-(start + size) // BLOCK) * BLOCK
    buffer = _buffer()
    count = _transfer(lambda: os.preadv(descriptor, [buffer[: stop - first]], first), descriptor)
    return buffer[start - first : min(count, start - first + size)]


class Appending:
    """Appends to a file. What does not fill a block waits in memory for what follows."""

    def __init__(self, file: io.FileIO) -> None:
        """`file` is open to read and write, and its position stays; it is appended to its end."""
        size = os.fstat(file.fileno()).st_size
        self._file = file
        self._at = size // BLOCK * BLOCK
        self._rest = os.pread(file.fileno(), size - self._at, self._at)
        # The same file again, even if another has its name by now.
        self._direct = _open(Path(f"/proc/self/fd/{file.fileno()}"), os.O_WRONLY)

    def write(self, pieces: Sequence[memoryview]) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        buffer, filled = _buffer(), len(self._rest)
        buffer[:filled] = self._rest
        for piece in pieces:
            left = piece
            while left:
                taken = min(len(left), PIECE_BYTES - filled)
                buffer[filled : filled + taken] = left[:taken]
                left, filled = left[taken:], filled + taken
                if filled == PIECE_BYTES:
                    self._put(buffer)
                    filled = 0
        whole = filled // BLOCK * BLOCK
        self._put(buffer[:whole])
        self._rest = bytes(buffer[whole:filled])

    def settle(self) -> None:
        """Writes what waits, as well. Raises as `write`."""
        rest, at = memoryview(self._rest), self._at
        while rest:
            written = os.pwrite(self._file.fileno(), rest, at)
            rest, at = rest[written:], at + written

    def close(self) -> None:
        os.close(self._direct)

    def _put(self, blocks: memoryview) -> None:
        while blocks:
            written = _transfer(partial(os.pwrite, self._direct, blocks, self._at), self._direct)
            blocks, self._at = blocks[written:], self._at + written
