"""Averaging generalists as a stream: one update is in memory at a time, however many there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime import wire
from edge_runtime.adapters import Vectors
from protos import manifest_pb2 as pb


@dataclass(frozen=True)
class Contribution:
    """One device's accepted update."""

    device: str
    path: Path
    """File with the payload, as `wire.encode` writes it."""
    weight: int
    """Share in the mean, relative to the others: 1 for all, or tokens. More than 0."""


def mean(manifest: pb.Manifest, contributions: Iterable[Contribution]) -> Vectors:
    """Weighted mean of the payloads: shared role -> float32 vector.

    Sums are float64, in the order of device ids, so the same contributions give the same bytes
    in whatever order they are listed and however often it is done.

    Raises:
        AdapterError: a payload does not fit the manifest.
        ValueError: there are no contributions.
    """
    ordered = sorted(contributions, key=lambda contribution: contribution.device)
    if not ordered:
        raise ValueError("nothing to average")
    total = sum(contribution.weight for contribution in ordered)
    sums = {role.name: np.zeros(role.size, np.float64) for role in manifest.roles if role.shared}
    for contribution in ordered:
        update = wire.decode(manifest, contribution.path.read_bytes())
        for role, vector in update.items():
            sums[role] += vector * np.float64(contribution.weight)
    return {role: (vector / total).astype(np.float32) for role, vector in sums.items()}
