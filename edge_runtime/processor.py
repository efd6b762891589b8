"""What this machine's processor is."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path


def processor() -> dict[str, str]:
    """What Linux says of the first one: "model name", "flags" (x86) or "features" (ARM), ..."""
    fields: dict[str, str] = {}
    said = Path("/proc/cpuinfo")
    for line in said.read_text(encoding="utf-8").splitlines() if said.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    return fields


def cuts_sums(fields: Mapping[str, str], machine: str = platform.machine()) -> bool:
    """Whether ONNX Runtime's products of bytes with signed bytes may be wrong.

    x86 without VNNI has an instruction that adds two of them in 16 bits, and cuts what is larger.

    Args:
        fields: what `processor` returns. Of an x86 that is not told of, the worse is assumed.
    """
    x86 = machine.lower() in ("x86_64", "amd64", "i386", "i686", "x86")
    return x86 and not {"avx512_vnni", "avx_vnni"} & set(fields.get("flags", "").split())
