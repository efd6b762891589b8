"""Names that tests share beside the fixtures; a module of its own, since every folder may have a
`conftest`."""

from collections.abc import Callable

from edge_runtime.bundle import Bundle
from export.tiers import Tier

TIER = Tier(
    name="test",
    train_length=16,
    micro_batches=(1, 2),
    eval_batch=2,
    context=32,
    prefill_chunk=8,
    memory_mib=4096,
)
ExportTiny = Callable[..., Bundle]
