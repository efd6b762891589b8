"""What this machine's processor is."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Collection
from pathlib import Path

# Instructions for products of bytes: of x86 and of ARM.
VNNI = ("avx512_vnni", "avx_vnni")
FAST_PRODUCTS = (*VNNI, "asimddp")


def processor() -> dict[str, str]:
    """What Linux says of the first one: "model name", "flags" (x86) or "features" (ARM), ..."""
    fields: dict[str, str] = {}
    said = Path("/proc/cpuinfo")
    for line in said.read_text(encoding="utf-8").splitlines() if said.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    return fields


@functools.cache
def features() -> frozenset[str]:
    """What it has instructions for, in Linux's words; elsewhere nothing is known."""
    fields = processor()
    return frozenset(fields.get("flags", fields.get("features", "")).split())


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cuts_sums(found: Collection[str], machine: str = platform.machine()) -> bool:
    """Whether ONNX Runtime's products of bytes with signed bytes may be wrong.

    x86 without VNNI has an instruction that adds two of them in 16 bits, and cuts what is larger.

    Args:
        found: what `features` returned. Where nothing is known, the worse is assumed.
    """
    x86 = machine.lower() in ("x86_64", "amd64", "i386", "i686", "x86")
    return x86 and not any(name in found for name in VNNI)
