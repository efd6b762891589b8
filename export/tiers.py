"""Device tiers: the static shapes of a bundle's programs, and the class of devices they are for.

The tiers are data (`tiers.json`), each with the reasons for its figures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from protos import manifest_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Shapes in tokens and sequences, and memory; see `Tier` in protos/manifest.proto."""

    name: str
    train_length: int
    micro_batches: tuple[int, ...]
    eval_batch: int
    context: int
    prefill_chunk: int
    memory_mib: int

    def fitted(self, positions: int) -> Tier:
        """The tier for a base with this many positions: no shape exceeds them."""
        return Tier(
            name=self.name,
            train_length=min(self.train_length, positions),
            micro_batches=self.micro_batches,
            eval_batch=self.eval_batch,
            context=min(self.context, positions),
            prefill_chunk=min(self.prefill_chunk, positions),
            memory_mib=self.memory_mib,
        )

    def to_manifest(self) -> pb.Tier:
        return pb.Tier(**{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """What a tier stands for: the threads and the resident memory that the app may take."""

    device: str
    why: str
    threads: int
    memory_mib: int


def tiers() -> dict[str, Tier]:
    """All tiers by name."""
    return {
        name: Tier(
            name=name,
            **{
                field.name: value[field.name]
                for field in fields(Tier)
                if field.name not in ("name", "micro_batches")
            },
            micro_batches=tuple(value["micro_batches"]),
        )
        for name, value in _data().items()
    }


def device_classes() -> dict[str, DeviceClass]:
    """The devices of all tiers, by the tier's name."""
    return {
        name: DeviceClass(**{field.name: value[field.name] for field in fields(DeviceClass)})
        for name, value in _data().items()
    }


def _data() -> dict[str, dict[str, Any]]:
    data: dict[str, dict[str, Any]] = json.loads(
        (files("export") / "tiers.json").read_text(encoding="utf-8")
    )
    return data
