"""The device programs as pure functions of arrays.

| program | inputs | outputs |
|---|---|---|
| `train_step.b<B>` | tokens, targets (B, T) | loss, cross_entropy, grad:<tensor> for every tensor |
| `router_step.b<B>` | the same | loss, cross_entropy, grad:<tensor> for the router's tensors |
| either with `.recompute` | the same | the same, in less memory and more time |
| `eval_loss` | tokens, targets (B, T) | losses (B, T), nats per token |
| `prefill` | tokens (T,), position, last (1,), cache | logits (V,), routing (L, T, n), cache |
| `decode` | tokens (1,), position (1,), cache | logits (V,), routing (L, 1, n), cache |

Every program also takes all adapter tensors, in manifest order, after its own inputs. Token ids and
positions are int64, everything else float32. `routing` is absent with one expert.

The cache is `cache.<l>.key` and `.value`. On an engine that can attend to it in place, each is
(1, K, C, D), and the outputs `updated.<l>.key` and `.value` are for the same memory; there is no
`last`, T is any number for `prefill` and for `decode`, and their adapters come stacked
(`edge_runtime.adapters.Stacks`). The two differ where weights are quantised in another way for many
tokens at once than for few. On other engines each is (K, C, D), the outputs are `new.<l>.key` and
`.value` (K, T, D) to store, and T is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from edge_runtime.adapters import ROUTER, Stacks
from edge_runtime.errors import BaseModelError
from export.decoder import Decoder, Routing
from export.inference import extend_in_place
from export.tiers import Tier
from protos import manifest_pb2 as pb

Shape = tuple[int, ...]
# What to trace a program for any number of tokens with: primes, of which other sizes are seldom
# multiples.
LENGTHS = (61, 59, 53, 47, 43, 41, 37, 31, 29, 23, 19, 17, 13, 11, 7, 5, 3)


@dataclass(frozen=True)
class Blocks:
    """Products with weights of `bits` bits, and at most `size` inputs of a row on one scale.

    They read weights as fast as memory gives them, for few rows.
    """

    bits: int
    size: int

    def lengths(self, inputs: int) -> list[int]:
        """Of blocks of that many inputs, a multiple of 16; the smallest only for want of others."""
        return [n for n in (256, 128, 64, 32) if n <= self.size and inputs % n == 0] or [16]


BLOCKS = {"int8": Blocks(8, 256), "int4": Blocks(4, 32)}
"""Of what continues a text, by precision."""
BLOCK_MULTIPLES = {"onnxruntime": 16, "executorch": 32}
"""Blocks are of so many inputs, or several times that; a matrix with others has eight bits."""


@dataclass(frozen=True)
class Specification:
    """A program before compilation.

    `call(*inputs) -> outputs` is ordinary PyTorch with autograd: it is what the compiled program is
    compared with. `inputs` are its own; the adapters follow.
    """

    name: str
    inputs: tuple[tuple[str, torch.dtype, Shape], ...]
    adapters: tuple[str, ...]
    """Names of the adapters that it takes: tensors of the manifest, or stacks of them."""
    outputs: tuple[str, ...]
    call: Callable[..., tuple[Tensor, ...]]
    function: str
    """The same for programs of which each computes some or all outputs of the same function."""
    base: nn.Module
    """Holds the frozen weights that `call` uses."""
    length: int = 0
    """If not 0: the program is for any number of tokens, and where its shapes have a multiple of
    this there is one of that number."""
    longest: int = 0
    """The largest such number."""
    same_as: str = ""
    """Another program whose compiled form serves for this one too."""
    blocks: Blocks | None = None
    """How its large matrices are quantised, if not in the way of all programs."""
    optional: tuple[str, ...] = ()
    """Outputs that a program which is the `same_as` this one leaves out, with what they cost."""

    @property
    def trains(self) -> bool:
        """Whether it is for text with its next tokens: a training step, or the loss alone."""
        return any(name == "targets" for name, _, _ in self.inputs)


def specifications(
    decoder: Decoder, manifest: pb.Manifest, tier: Tier, engine: str
) -> list[Specification]:
    """All programs of a tier for an engine.

    A training step with less memory is for the smallest batch, where it is the last resort. For
    ExecuTorch there is none, and no router's step: lowering another step takes too long.
    """
    # ONNX Runtime's attention over a cache is for heads of whole vectors: of 8, rotated ones of 16.
    tensors = manifest.tensors
    on_onnx = engine == "onnxruntime"
    vectors = 16 if decoder.rotary() else 8
    in_place = on_onnx and decoder.architecture.head_dim % vectors == 0
    blocks = BLOCKS["int4"] if manifest.base.precision == "int4" else None
    multiple = BLOCK_MULTIPLES[engine]
    if blocks and all(each.inputs % multiple for each in decoder.architecture.maps):
        raise BaseModelError(
            f"{engine} has products with weights of four bits for a multiple of {multiple} inputs, "
            "and no matrix of this base has that; use --precision int8"
        )
    steps = [(size, False) for size in tier.micro_batches]
    steps += [(min(tier.micro_batches), True)] if on_onnx else []
    kinds = (False, True) if on_onnx and decoder.mixture.specialists else (False,)
    return [
        *(
            train_step(decoder, tensors, size, tier.train_length, recompute=again, router_only=kind)
            for size, again in steps
            for kind in kinds
        ),
        eval_loss(decoder, tensors, tier.eval_batch, tier.train_length),
        *(
            in_place_programs(decoder, manifest, tier.context)
            if in_place
            else (
                extend(decoder, tensors, "prefill", tier.prefill_chunk, tier.context, blocks),
                extend(decoder, tensors, "decode", 1, tier.context, blocks),
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
    router_only: bool = False,
) -> Specification:
    """Loss and gradients; with `router_only` no others than what the router learns from."""
    names = [tensor.name for tensor in tensors]
    of_router = [tensor.name for tensor in tensors if tensor.role == ROUTER]
    learning = of_router if router_only else names
    left_out = [name for name in learning if of_router and name not in of_router]
    variant = f"b{batch}" + (".recompute" if recompute else "")

    def call(tokens: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        adapters = {
            name: value.detach().requires_grad_(name in learning)
            for name, value in zip(names, values, strict=True)
        }
        loss, cross_entropy = decoder.loss(adapters, tokens, targets, recompute=recompute)
        gradients = torch.autograd.grad(loss, [adapters[name] for name in learning])
        return loss.detach(), cross_entropy.detach(), *gradients

    shape = (batch, length)
    return Specification(
        name=("router_step." if router_only else "train_step.") + variant,
        inputs=(("tokens", torch.int64, shape), ("targets", torch.int64, shape)),
        adapters=tuple(names),
        outputs=("loss", "cross_entropy", *(f"grad:{name}" for name in learning)),
        call=call,
        function=f"train_step.b{batch}",
        base=decoder,
        same_as=f"train_step.{variant}" if router_only else "",
        optional=tuple(f"grad:{name}" for name in left_out),
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
        adapters=tuple(names),
        outputs=("losses",),
        call=call,
        function="eval_loss",
        base=decoder,
    )


def extend(
    decoder: Decoder,
    tensors: Sequence[pb.Tensor],
    name: str,
    length: int,
    context: int,
    blocks: Blocks | None,
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
        adapters=tuple(names),
        outputs=(
            "logits",
            *(("routing",) if decoder.mixture.experts > 1 else ()),
            *_cache_names("new", a.layers),
        ),
        call=call,
        function="extend",
        base=decoder,
        blocks=blocks,
    )


def in_place_programs(
    decoder: Decoder, manifest: pb.Manifest, context: int
) -> tuple[Specification, Specification]:
    """`prefill` and `decode`, each of any number of tokens."""
    a = decoder.architecture
    stacks = {name: array.shape for name, array in Stacks(manifest).arrays.items()}
    names = [*stacks, *(tensor.name for tensor in manifest.tensors if tensor.role == ROUTER)]

    def call(
        tokens: Tensor, position: Tensor, *rest: Tensor, joined: bool = False
    ) -> tuple[Tensor, ...]:
        cache, adapters = _cache_and_adapters(rest, a.layers, names)
        with torch.no_grad():
            return _results(
                *extend_in_place(decoder, adapters, tokens, position, cache, joined=joined)
            )

    fixed = {size for weight in decoder.parameters() for size in weight.shape}
    fixed |= {size for shape in stacks.values() for size in shape}
    fixed |= {context, a.layers, a.heads, a.key_value_heads, a.head_dim, decoder.mixture.experts}
    apart = (n for n in LENGTHS if n <= context // 2 and all(size % n for size in fixed))
    length = next(apart, None)
    if length is None:
        raise BaseModelError(
            f"a context of {context} is too short for the base: no number of tokens up to half of "
            "it differs from all its sizes; export for a longer one"
        )
    shape = (1, a.key_value_heads, context, a.head_dim)
    prefill = Specification(
        name="prefill",
        inputs=(
            ("tokens", torch.int64, (length,)),
            ("position", torch.int64, (1,)),
            *((n, torch.float32, shape) for n in _cache_names("cache", a.layers)),
        ),
        adapters=tuple(names),
        outputs=(
            "logits",
            *(("routing",) if decoder.mixture.experts > 1 else ()),
            *_cache_names("updated", a.layers),
        ),
        call=call,
        function="extend",
        base=decoder,
        length=length,
        longest=context,
    )
    if manifest.base.precision == "float32":
        return prefill, replace(prefill, name="decode", same_as="prefill")
    # Few rows are fastest with blocks; many with one scale for a column, and in eight bits.
    blocks = BLOCKS[manifest.base.precision]
    prefill = replace(prefill, call=partial(call, joined=True))
    return prefill, replace(prefill, name="decode", blocks=blocks)


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
