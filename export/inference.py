"""Continuing a text on an engine that attends to a KV cache in one operator, in few operators.

A token takes as long as its weights take to read and its operators take to start, and there are
hundreds of those. So what an engine has an operator for is one operator of the graph here, and the
LoRA pairs of all experts on a map come as one, stacked when a person's adapters are put in place
(`edge_runtime.adapters.Stacks`).

Shapes are those of `decoder.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from edge_runtime.adapters import STACK
from export.decoder import NEGATIVE, Decoder, Routing

Stacks = Mapping[str, Tensor]
"""What `edge_runtime.adapters.Stacks` gives, and the router's tensors by their own names."""


def extend_in_place(
    decoder: Decoder,
    stacks: Stacks,
    tokens: Tensor,
    position: Tensor,
    cache: list[tuple[Tensor, Tensor]],
    *,
    joined: bool,
) -> tuple[Tensor, list[Routing], list[tuple[Tensor, Tensor]]]:
    """Continues a text by T tokens, 1 or more, on top of a KV cache.

    Args:
        tokens: (T,), the new tokens.
        position: (1,), how many entries of the cache are filled.
        cache: per block, keys and values, each (1, K, C, D); C is at least `position` + T, and
            entries from `position` on are ignored, whatever they hold.
        joined: see `Decoder.attention_inputs`.

    Returns:
        Logits (V,) after the last token, every block's routing, and per block the cache as it is
        then, which an engine may keep where `cache` is.
    """
    at, filled = torch.ops.comigs.positions(tokens, position)
    x = decoder.embed(tokens.unsqueeze(0), at)
    heads, rotary = decoder.architecture.heads, decoder.rotary()
    routings, updated = [], []
    for layer, (keys, values) in enumerate(cache):
        block = f"{decoder.blocks}.{layer}"
        normed = decoder.fused_norm(x, f"{block}.{decoder.FIRST_NORM}")
        q, k, v = decoder.attention_inputs(stacks, block, normed, joined)
        attended, *pair = torch.ops.comigs.cached_attention(
            q, k, v, keys, values, filled, heads, *rotary
        )
        updated.append((pair[0], pair[1]))
        x = x + adapted(decoder, stacks, f"{block}.{decoder.ATTENTION_OUTPUT}", attended)
        normed = decoder.fused_norm(x, f"{block}.{decoder.SECOND_NORM}")
        routing = decoder.route(stacks, block, normed)
        x = x + _mlp(decoder, stacks, block, normed, routing)
        routings += [] if routing is None else [routing]
    last = decoder.fused_norm(x[-1:], decoder.FINAL_NORM)
    return (last @ decoder.head().T).squeeze(0), routings, updated


def adapted(
    decoder: Decoder, stacks: Stacks, key: str, x: Tensor, shares: Tensor | None = None
) -> Tensor:
    """A frozen map and the LoRA pairs on it: (N, in) -> (N, out).

    Args:
        shares: (N, n r), each expert's share at each of its ranks, where experts are mixed.
    """
    y = decoder.linear(x, key)
    pair = stacked(decoder, stacks, key)
    if pair is None:
        return y
    low = x @ pair[0].T
    return y + (low if shares is None else low * shares) @ pair[1]


def stacked(decoder: Decoder, stacks: Stacks, key: str) -> tuple[Tensor, Tensor] | None:
    """A (n r, in), scaled, and B^T (n r, out) of a map's experts, or None if it is no target."""
    name = f"{STACK}/{decoder.prefix}{key}"
    if f"{name}.lora_A.weight" not in stacks:
        return None
    return stacks[f"{name}.lora_A.weight"], stacks[f"{name}.lora_B.weight"]


def _mlp(
    decoder: Decoder, stacks: Stacks, block: str, x: Tensor, routing: Routing | None
) -> Tensor:
    """(N, d) -> (N, d); see `Decoder.mlp`."""
    inputs = [f"{block}.{name}" for name in decoder.MLP_INPUTS]
    output = f"{block}.{decoder.MLP_OUTPUT}"
    if routing is None:
        parts = [adapted(decoder, stacks, key, x) for key in inputs]
        return adapted(decoder, stacks, output, decoder.fused_activation(*parts))
    n, r = decoder.mixture.experts, decoder.mixture.rank
    shares = routing.mix @ torch.eye(n, dtype=x.dtype).repeat_interleave(r, 1)
    if decoder.mixture.mixing == "per_linear":
        parts = [adapted(decoder, stacks, key, x, shares) for key in inputs]
        return adapted(decoder, stacks, output, decoder.fused_activation(*parts), shares)
    own = [slice(j * r, (j + 1) * r) for j in range(n)]
    parts_of = [_expert_parts(decoder, stacks, key, x, own) for key in inputs]
    inner = [decoder.fused_activation(*(parts[j] for parts in parts_of)) for j in range(n)]
    weighted = [u * routing.mix[:, j : j + 1] for j, u in enumerate(inner)]
    mixed = sum(weighted[1:], weighted[0])
    y = decoder.linear(mixed, output)
    pair = stacked(decoder, stacks, output)
    if pair is None:
        return y
    a, b = pair
    low = torch.cat([u @ a[rows].T for u, rows in zip(inner, own, strict=True)], -1)
    return y + (low * shares) @ b


def _expert_parts(
    decoder: Decoder, stacks: Stacks, key: str, x: Tensor, own: list[slice]
) -> list[Tensor]:
    """What a map gives with each expert's LoRA pair alone: n of (N, out)."""
    y = decoder.linear(x, key)
    pair = stacked(decoder, stacks, key)
    if pair is None:
        return [y] * len(own)
    low = x @ pair[0].T
    return [y + low[:, ranks] @ pair[1][ranks] for ranks in own]


@torch.library.custom_op("comigs::positions", mutates_args=())
def positions(tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Where T tokens stand that follow `position` (1,) others: (T,), and how many there are then:
    (1,)."""
    filled = position + tokens.shape[0]
    return torch.arange(tokens.shape[0]) + position, filled


@positions.register_fake
def _(tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(position)


@torch.library.custom_op("comigs::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor,
    values: Tensor,
    filled: Tensor,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention (Vaswani et al. 2017, eq. 1) of T tokens to all before them and themselves.

    Args:
        q: (T, H D); k and v: (T, K D), or None if they follow in `q`, (T, (H + 2 K) D).
        keys: the cache, (1, K, C, D), as `values`.
        filled: (1,), entries of the cache that are filled afterwards, the last T of them from here.
        heads: H.
        cos: and sin, (positions, D / 2), of the angles by which each position turns queries and
            keys, if it does (Su et al. 2021, eq. 34, with halves for pairs).

    Returns:
        What was attended to (T, H D), and the cache with k and v in it.
    """
    t, total = q.shape[0], int(filled)
    groups, dim = keys.shape[1], keys.shape[3]
    if k is None or v is None:
        q, k, v = torch.split(q, [heads * dim, groups * dim, groups * dim], -1)
    if cos is not None and sin is not None:
        q, k = (_turned(y, cos[total - t : total], sin[total - t : total]) for y in (q, k))
    keys, values = keys.clone(), values.clone()
    for cache, new in ((keys, k), (values, v)):
        cache[0, :, total - t : total] = new.view(t, groups, dim).transpose(0, 1)
    queries = q.view(t, groups, heads // groups, dim).permute(1, 2, 0, 3)  # (K, G, T, D)
    seen, read = (cache[0, :, None, :total] for cache in (keys, values))  # (K, 1, total, D)
    future = torch.full((t, total), NEGATIVE, dtype=q.dtype).triu(total - t + 1)
    p = torch.softmax(queries @ seen.mT / math.sqrt(dim) + future, -1)
    return (p @ read).permute(2, 0, 1, 3).reshape(t, -1), keys, values


@cached_attention.register_fake
def _(
    q: Tensor, k: Tensor | None, v: Tensor | None, keys: Tensor, values: Tensor, filled: Tensor,
    heads: int, cos: Tensor | None = None, sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    attended = q.new_empty(q.shape[0], heads * keys.shape[3])
    return attended, torch.empty_like(keys), torch.empty_like(values)


def _turned(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads D) by angles (T, D / 2)."""
    first, second = y.view(y.shape[0], -1, 2, cos.shape[1]).unbind(2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], 2)
    return turned.view(y.shape)


@torch.library.custom_op("comigs::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """w x / rms(x) (Zhang and Sennrich 2019): (N, d) -> (N, d)."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)
