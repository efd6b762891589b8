"""Device tiers: the static shapes of a bundle's programs.

The tiers are data (`tiers.json`), each with the device class that it stands for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib.resources import files

from protos import manifest_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Shapes in tokens and sequences; see `Tier` in protos/manifest.proto."""

    name: str
    train_length: int
    micro_batches: tuple[int, ...]
    eval_batch: int
    context: int
    prefill_chunk: int

    def fitted(self, positions: int) -> Tier:
        """The tier for a base with this many positions: no shape exceeds them."""
        return Tier(
            name=self.name,
            train_length=min(self.train_length, positions),
            micro_batches=self.micro_batches,
            eval_batch=self.eval_batch,
            context=min(self.context, positions),
            prefill_chunk=min(self.prefill_chunk, positions),
        )

    def to_manifest(self) -> pb.Tier:
        return pb.Tier(**{field.name: getattr(self, field.name) for field in fields(self)})


def tiers() -> dict[str, Tier]:
    """All tiers by name."""
    data = json.loads((files("export") / "tiers.json").read_text(encoding="utf-8"))
    return {
        name: Tier(
            name=name,
            micro_batches=tuple(value["micro_batches"]),
            **{k: v for k, v in value.items() if k not in ("micro_batches", "device")},
        )
        for name, value in data.items()
    }
