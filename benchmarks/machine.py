"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from typing import TypedDict

import psutil

from edge_runtime.processor import features, processor, usable_cores

# What integer and half-precision products are made of.
INTERESTING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")


class Machine(TypedDict):
    """The processor, its cores that this process may use, and the memory."""

    processor: str
    architecture: str
    cores: int
    features: list[str]
    memory_gib: float
    kernel: str
    python: str
    load_average: float
    """Processes that wanted to run in the last minute, this benchmark's included: the noise."""


def machine() -> Machine:
    found = features()
    return {
        "processor": processor().get("model name", platform.processor() or platform.machine()),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "features": [feature for feature in INTERESTING if feature in found],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }
