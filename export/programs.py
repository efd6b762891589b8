"""The device programs as pure functions of arrays.

| program | inputs | outputs |
|---|---|---|
| `train_step.b<B>` | tokens, targets (B, T) | loss, cross_entropy, grad:<tensor> for every tensor |
| `train_step.b<B>.recompute` | the same | the same, in less memory and more time |
| `eval_loss` | tokens, targets (B, T) | losses (B, T), nats per token |
| `prefill` | tokens (T,), position, last (1,), cache | logits (V,), routing (L, T, n), cache |
| `decode` | token (1,), position (1,), cache | logits (V,), routing (L, 1, n), cache |

Every program also takes all adapter tensors, in manifest order, after its own inputs. Token ids and
positions are int64, everything else float32. `routing` is absent with one expert.

The cache is `cache.<l>.key` and `.value`. On an engine that can attend to it in place, each is
(1, K, C, D), and the outputs `updated.<l>.key` and `.value` are for the same memory; T is then any
number, there is no `last`, and `decode` is `prefill` with one token. On others each is (K, C, D),
the outputs are `new.<l>.key` and `.value` (K, T, D) to store, and T is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from export.decoder import Decoder, Routing
from export.tiers import Tier
from protos import manifest_pb2 as pb

Shape = tuple[int, ...]
# What to trace a program for any number of tokens with: primes, of which other sizes are seldom
# multiples.
LENGTHS = (61, 59, 53, 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5, 3)


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
    length: int = 0
    """If not 0: the program is for any number of tokens, and where its shapes have a multiple of
    this there is one of that number."""
    longest: int = 0
    """The largest such number."""
    same_as: str = ""
    """Another program whose compiled form serves for this one too."""


def specifications(
    decoder: Decoder, tensors: Sequence[pb.Tensor], tier: Tier, engine: str
) -> list[Specification]:
    """All programs of a tier for an engine.

    A training step with less memory is for the smallest batch, where it is the last resort; for
    ExecuTorch there is none, since lowering another step takes too long.
    """
    # ONNX Runtime's attention over a cache is for heads of whole vectors of eight.
    smallest = min(tier.micro_batches)
    in_place = engine == "onnxruntime" and decoder.architecture.head_dim % 8 == 0
    return [
        *(train_step(decoder, tensors, size, tier.train_length) for size in tier.micro_batches),
        *(
            [train_step(decoder, tensors, smallest, tier.train_length, recompute=True)]
            if engine == "onnxruntime"
            else []
        ),
        eval_loss(decoder, tensors, tier.eval_batch, tier.train_length),
        *(
            extend_in_place(decoder, tensors, tier.context)
            if in_place
            else (
                extend(decoder, tensors, "prefill", tier.prefill_chunk, tier.context),
                extend(decoder, tensors, "decode", 1, tier.context),
            )
        ),
    ]


def train_step(
    decoder: Decoder,
    tensors: Sequence[pb.Tensor],
    batch: int,
    length: int,
    *,
    recompute: bool = False,
) -> Specification:
    names = [tensor.name for tensor in tensors]

    def call(tokens: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.detach().requires_grad_(True) for value in values]
        adapters = dict(zip(names, leaves, strict=True))
        loss, cross_entropy = decoder.loss(adapters, tokens, targets, recompute=recompute)
        gradients = torch.autograd.grad(loss, leaves)
        return loss.detach(), cross_entropy.detach(), *gradients

    shape = (batch, length)
    return Specification(
        name=f"train_step.b{batch}" + (".recompute" if recompute else ""),
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
    """`prefill` or `decode` with a fixed number of tokens."""
    a = decoder.architecture
    names = [tensor.name for tensor in tensors]
    with_last = length > 1  # a single token is its own last one

    def call(tokens: Tensor, position: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        last, rest = (rest[0], rest[1:]) if with_last else (torch.zeros(1, dtype=torch.int64), rest)
        cache, adapters = _cache_and_adapters(rest, a.layers, names)
        with torch.no_grad():
            logits, routings, fresh = decoder.extend(adapters, tokens, position, last, cache)
        return _results(logits, routings, fresh)

    own = [("tokens", torch.int64, (length,)), ("position", torch.int64, (1,))]
    own += [("last", torch.int64, (1,))] if with_last else []
    shape = (a.key_value_heads, context, a.head_dim)
    return Specification(
        name=name,
        inputs=(*own, *((n, torch.float32, shape) for n in _cache_names("cache", a.layers))),
        outputs=(
            "logits",
            *(("routing",) if decoder.mixture.experts > 1 else ()),
            *_cache_names("new", a.layers),
        ),
        call=call,
        base=decoder,
    )


def extend_in_place(
    decoder: Decoder, tensors: Sequence[pb.Tensor], context: int
) -> tuple[Specification, Specification]:
    """`prefill` of any number of tokens, and `decode`, which is the same with one."""
    a = decoder.architecture
    names = [tensor.name for tensor in tensors]

    def call(tokens: Tensor, position: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        cache, adapters = _cache_and_adapters(rest, a.layers, names)
        with torch.no_grad():
            logits, routings, updated = decoder.extend_in_place(adapters, tokens, position, cache)
        return _results(logits, routings, updated)

    def specification(name: str, tokens: int) -> Specification:
        shape = (1, a.key_value_heads, context, a.head_dim)
        return Specification(
            name=name,
            inputs=(
                ("tokens", torch.int64, (tokens,)),
                ("position", torch.int64, (1,)),
                *((n, torch.float32, shape) for n in _cache_names("cache", a.layers)),
            ),
            outputs=(
                "logits",
                *(("routing",) if decoder.mixture.experts > 1 else ()),
                *_cache_names("updated", a.layers),
            ),
            call=call,
            base=decoder,
        )

    fixed = {size for weight in decoder.parameters() for size in weight.shape}
    fixed |= {size for tensor in tensors for size in tensor.shape}
    fixed |= {context, a.layers, a.heads, a.key_value_heads, a.head_dim}
    length = next(n for n in LENGTHS if n <= context // 2 and all(size % n for size in fixed))
    prefill = replace(specification("prefill", length), length=length, longest=context)
    return prefill, replace(specification("decode", 1), same_as="prefill")


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _cache_and_adapters(
    values: Sequence[Tensor], layers: int, names: Sequence[str]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    flat, adapters = values[: 2 * layers], values[2 * layers :]
    return list(zip(flat[::2], flat[1::2], strict=True)), dict(zip(names, adapters, strict=True))


def _results(
    logits: Tensor, routings: Sequence[Routing], cache: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    routing = (torch.stack([r.mix for r in routings]),) if routings else ()
    return logits, *routing, *(part for pair in cache for part in pair)
