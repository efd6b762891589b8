"""What this process takes of the machine's memory."""

import ctypes
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident set that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def return_freed_memory() -> None:
    """Gives the system back what was freed; glibc keeps most of what a program had."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
