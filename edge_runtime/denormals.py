"""Denormal numbers as zeros, in one thread, while a program runs.

Exponentials of what attention masks are smaller than float32's normal numbers. Intel's processors
take some hundred cycles for each such result: with zeros a prompt of 128 tokens takes 0.90 of the
time, one of 500 tokens 0.76 (GPT-2 124M in int8 on ONNX Runtime, Xeon with AMX; the same results;
the programs with and without took turns in one process, which no `comigs bench` does).
ExecuTorch's programs are as fast either way.

The switch is a part of each thread's floating-point environment. Left on it would change what
Python and numpy compute there, so it is put back. What this module does not know how to switch
stays as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator

# Of MXCSR: denormal results as zeros, denormal operands as zeros.
FLUSH = 1 << 15 | 1 << 6


class _Environment(ctypes.Structure):
    """C's fenv_t on x86-64: the old coprocessor's, of no use here, and MXCSR."""

    _fields_ = (("x87", ctypes.c_uint32 * 7), ("mxcsr", ctypes.c_uint32))


def _library() -> ctypes.PyDLL | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    process = ctypes.PyDLL(None)
    return process if hasattr(process, "fegetenv") and hasattr(process, "fesetenv") else None


_LIBRARY = _library()
CAN_BE_FLUSHED = _LIBRARY is not None


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Within it, in this thread and in those started from it, denormal numbers are zeros."""
    if _LIBRARY is None:
        yield
        return
    before, during = _Environment(), _Environment()
    _LIBRARY.fegetenv(ctypes.byref(before))
    ctypes.memmove(ctypes.byref(during), ctypes.byref(before), ctypes.sizeof(before))
    during.mxcsr |= FLUSH
    _LIBRARY.fesetenv(ctypes.byref(during))
    try:
        yield
    finally:
        _LIBRARY.fesetenv(ctypes.byref(before))
