"""Looks at an installation and says what to do about what it finds."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from edge_runtime.errors import BudgetError, ComigsError, MissingPartError, StorageError
from edge_runtime.processor import FAST_PRODUCTS, features, usable_cores
from protos import coordinator_pb2 as pb

# What works together: executorch's wheel is built for one torch.
PAIRS = {"executorch": ("1.4.1", "torch", "2.13.0")}
ENOUGH_MEMORY = 512 * 2**20
ENOUGH_DISK = 1 * 2**30


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, what was found, and the command that mends it."""

    what: str
    found: str
    code: int = 0
    """That `comigs doctor` ends with because of it; 0 if all is well."""
    mend: str = ""

    @property
    def ok(self) -> bool:
        return self.code == 0


def examine(
    home: Path, invitation: pb.Invitation | None = None, insecure: str | None = None
) -> list[Finding]:
    """All checks; the network only where there is a coordinator to call.

    That is the one of `invitation`, the one at `insecure` (HOST:PORT), or the one of `home`.
    """
    findings = [_python(), _onnxruntime(), _executorch(), _integer_products()]
    findings += [_threads(), _memory(), _disk(home)]
    trip = _round_trip(home, invitation, insecure)
    return [*findings, trip] if trip else findings


def installed(package: str) -> str | None:
    """Its version, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", found, 0 if sys.version_info >= (3, 11) else MissingPartError.code)


def _onnxruntime() -> Finding:
    found = installed("onnxruntime")
    if found is None:
        mend = "pip install 'comigs[device]'"
        return Finding("engine onnxruntime", "not installed", MissingPartError.code, mend)
    return Finding("engine onnxruntime", found)


def _executorch() -> Finding:
    found = installed("executorch")
    if found is None:
        return Finding("engine executorch", "not installed (only needed for .pte programs)")
    wanted, partner, partner_wanted = PAIRS["executorch"]
    partner_found = (installed(partner) or "none").split("+")[0]
    together = f"{found} with {partner} {partner_found}"
    if (found, partner_found) == (wanted, partner_wanted):
        return Finding("engine executorch", together)
    mend = f"pip install executorch=={wanted} {partner}=={partner_wanted}"
    return Finding("engine executorch", together, MissingPartError.code, mend)


def _integer_products() -> Finding:
    of = next((name for name in FAST_PRODUCTS if name in features()), None)
    found = f"fast ({of})" if of else "not known to be fast: expect less of int8 and int4 bundles"
    return Finding("integer products", found)


def _threads() -> Finding:
    return Finding("threads", f"{usable_cores()} of {os.cpu_count()} cores usable")


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    found = f"{free // 2**20} MiB available"
    if free >= ENOUGH_MEMORY:
        return Finding("memory", found)
    return Finding("memory", found, BudgetError.code, "comigs plan --bundle DIR --memory SIZE")


def _disk(home: Path) -> Finding:
    existing = next(p for p in [home.resolve(), *home.resolve().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free // 2**20} MiB free at {existing}"
    if free >= ENOUGH_DISK:
        return Finding("disk", found)
    mend = "choose another --home, on a disk with 1 GiB free"
    return Finding("disk", found, StorageError.code, mend)


def _round_trip(
    home: Path, invitation: pb.Invitation | None, insecure: str | None
) -> Finding | None:
    from edge_runtime.client import connect_to_enrol
    from edge_runtime.connection import CALL_SECONDS, Patience, Unproven, connect
    from edge_runtime.store import Home
    from protos.coordinator_pb2_grpc import CoordinatorStub

    patience = Patience(3, on_wait=lambda _: None)
    try:
        if invitation:
            connection = connect_to_enrol(invitation, patience)
        else:
            who = Unproven(insecure, "") if insecure else Home(home).identity()
            if who is None:
                return None
            connection = connect(who, patience)
        with connection:
            milliseconds = 1000 * connection.ping()
            if not (invitation or insecure):  # whom it knows may ask this; it changes nothing
                stub = CoordinatorStub(connection.channel)
                connection.retry(lambda: stub.UploadOffset(pb.UploadHeader(), timeout=CALL_SECONDS))
    except ComigsError as error:
        return Finding("coordinator", str(error), error.code)
    return Finding("coordinator", f"{connection.address} answers in {milliseconds:.0f} ms")
