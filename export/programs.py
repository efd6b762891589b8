"""The device programs as pure functions of arrays.

| program | inputs | outputs |
|---|---|---|
| `train_step.b<B>` | tokens, targets (B, T) | loss, cross_entropy, grad:<tensor> for every tensor |
| `eval_loss` | tokens, targets (B, T) | losses (B, T), nats per token |
| `prefill` | tokens (T,), position, last (1,), cache | logits (V,), routing (L, T, n), new cache |
| `decode` | token (1,), position (1,), cache | logits (V,), routing (L, 1, n), new cache |

Every program also takes all adapter tensors, in manifest order, after its own inputs. The cache is
`cache.<l>.key` and `.value`, each (K, C, D), with `new.<l>.key` and `.value` (K, T, D) to store.
Token ids and positions are int64, everything else float32. `routing` is absent with one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.decoder import Decoder
from export.tiers import Tier
from protos import manifest_pb2 as pb

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Specification:
    """A program before compilation.

    `call(*inputs) -> outputs` is ordinary PyTorch with autograd: it is what the compiled program is
    compared with. `inputs` are its own; the adapters follow.
    """

    name: str
    inputs: tuple[tuple[str, torch.dtype, Shape], ...]
    outputs: tuple[str, ...]
    call: Callable[..., tuple[Tensor, ...]]
    base: nn.Module
    """Holds the frozen weights that `call` uses."""


def specifications(
    decoder: Decoder, tensors: Sequence[pb.Tensor], tier: Tier
) -> list[Specification]:
    """All programs of a tier."""
    return [
        *(train_step(decoder, tensors, size, tier.train_length) for size in tier.micro_batches),
        eval_loss(decoder, tensors, tier.eval_batch, tier.train_length),
        extend(decoder, tensors, "prefill", tier.prefill_chunk, tier.context),
        extend(decoder, tensors, "decode", 1, tier.context),
    ]


def train_step(
    decoder: Decoder, tensors: Sequence[pb.Tensor], batch: int, length: int
) -> Specification:
    names = [tensor.name for tensor in tensors]

    def call(tokens: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_(True) for value in values]
        adapters = dict(zip(names, leaves, strict=True))
        loss, cross_entropy = decoder.loss(adapters, tokens, targets)
        gradients = torch.autograd.grad(loss, leaves)
        return loss.detach(), cross_entropy.detach(), *gradients

    shape = (batch, length)
    return Specification(
        name=f"train_step.b{batch}",
        inputs=(("tokens", torch.int64, shape), ("targets", torch.int64, shape)),
        outputs=("loss", "cross_entropy", *(f"grad:{name}" for name in names)),
        call=call,
        base=decoder,
    )


def eval_loss(
    decoder: Decoder, tensors: Sequence[pb.Tensor], batch: int, length: int
) -> Specification:
    names = [tensor.name for tensor in tensors]

    def call(tokens: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            hidden, _ = decoder.hidden(dict(zip(names, values, strict=True)), tokens)
            return (decoder.token_losses(hidden, targets).view(batch, length),)

    shape = (batch, length)
    return Specification(
        name="eval_loss",
        inputs=(("tokens", torch.int64, shape), ("targets", torch.int64, shape)),
        outputs=("losses",),
        call=call,
        base=decoder,
    )


def extend(
    decoder: Decoder, tensors: Sequence[pb.Tensor], name: str, length: int, context: int
) -> Specification:
    names = [tensor.name for tensor in tensors]
    a = decoder.architecture
    cache_shape = (a.key_value_heads, context, a.head_dim)
    with_last = length > 1  # a single token is its own last one

    def call(tokens: Tensor, position: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        last, rest = (rest[0], rest[1:]) if with_last else (torch.zeros(1, dtype=torch.int64), rest)
        flat, values = rest[: 2 * a.layers], rest[2 * a.layers :]
        cache = list(zip(flat[::2], flat[1::2], strict=True))
        adapters = dict(zip(names, values, strict=True))
        with torch.no_grad():
            logits, routings, fresh = decoder.extend(adapters, tokens, position, last, cache)
        routing = (torch.stack([r.mix for r in routings]),) if routings else ()
        return logits, *routing, *(part for pair in fresh for part in pair)

    parts = [(layer, part) for layer in range(a.layers) for part in ("key", "value")]
    last_input = (("last", torch.int64, (1,)),) if with_last else ()
    return Specification(
        name=name,
        inputs=(
            ("tokens", torch.int64, (length,)),
            ("position", torch.int64, (1,)),
            *last_input,
            *((f"cache.{layer}.{part}", torch.float32, cache_shape) for layer, part in parts),
        ),
        outputs=(
            "logits",
            *(("routing",) if decoder.mixture.experts > 1 else ()),
            *(f"new.{layer}.{part}" for layer, part in parts),
        ),
        call=call,
        base=decoder,
    )
