"""GPT-2 and the Llama family with a mixture of LoRA experts, as functions of the adapters.

`Decoder` is what they have in common; `gpt2.py` and `llama.py` are the rest.

Shapes: N tokens (B sequences of T), d width, H query heads and K key and value heads of D numbers,
G = H / K, V vocabulary, n experts, r rank, C length of the KV cache. Activations stay
two-dimensional (N, d) outside attention, so that every product is a plain matrix product; what the
exporters get wrong or slow is written out by hand:

* the loss is logsumexp(logits) - <h, W[target]>, in chunks: no array of N x V, no scatter;
* the query heads that share a key head are rows of one product with it: nothing is repeated;
* top-k is a rank by comparison: no TopK, no scatter, ties go to the lower index on every engine;
* activations and norms have written-out gradients, in half the passes of autograd's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from edge_runtime.adapters import ROUTER
from export.base import Base
from export.mixture import GENERALIST, Mixture

Adapters = Mapping[str, Tensor]
Half: TypeAlias = Callable[[Adapters, Tensor], tuple[Tensor, ...]]
"""Of a block: (N, d) -> (N, d), and of the MLP's half what the router said, full and chosen."""
Positions = slice | Tensor
"""Where a sequence's T tokens stand: its first ones, or int64 (T,)."""
LOGITS_AT_ONCE = 4 * 2**20  # numbers; 16 MiB
NEGATIVE = -1e9  # an exponent of zero that survives arithmetic, unlike -inf


def positive(x: Tensor) -> Tensor:
    """1.0 where x > 0 and 0.0 elsewhere, without a comparison (XNNPACK has none)."""
    return torch.clamp(x * 1e38, 0.0, 1.0)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy under a frozen head, a few rows at a time: no (N, V) array ever exists.

    With the head frozen, all that the backward pass needs is each token's gradient with respect to
    its hidden state, (N, d); it is computed while the chunk's logits are at hand.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, LOGITS_AT_ONCE // head.shape[0])
        losses, gradients = [], []
        all_wanted = head[targets]  # (N, d)
        for start in range(0, hidden.shape[0], rows):
            h, wanted = hidden[start : start + rows], all_wanted[start : start + rows]
            logits = h @ head.T
            top = logits.amax(-1, keepdim=True)
            exponent = torch.exp(logits - top)
            total = exponent.sum(-1, keepdim=True)
            losses.append((torch.log(total) + top).squeeze(-1) - (h * wanted).sum(-1))
            gradients.append((exponent @ head) / total - wanted)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (per_token,) = ctx.saved_tensors
        return gradient.unsqueeze(-1) * per_token, None, None


class _Recomputed(torch.autograd.Function):
    """A piece of the forward pass of which only the input is kept, for the backward pass to compute
    it again (Chen et al. 2016, "Training deep nets with sublinear memory cost").

    `call` takes x and `values` and gives tensors of which the first is the next x.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., tuple[Tensor, ...]], x: Tensor, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(x, *values)
        ctx.set_materialize_grads(False)
        return call(x, *values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *values = ctx.saved_tensors
        # Zero, but known in the backward pass only: else an engine would compute this early, or
        # find that it has been computed already, and keep it.
        assert gradients[0] is not None
        x = x + gradients[0] * 0.0
        with torch.enable_grad():
            inputs = [value.detach().requires_grad_() for value in (x, *values)]
            outputs = ctx.call(*inputs)
            pairs = zip(outputs, gradients, strict=True)
            known = [(o, g) for o, g in pairs if o.requires_grad and g is not None]
            results = torch.autograd.grad(
                [o for o, _ in known], inputs, [g for _, g in known], allow_unused=True
            )
        return None, *results


def _recomputed(half: Half, adapters: Adapters, x: Tensor) -> tuple[Tensor, ...]:
    def call(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return half(dict(zip(adapters, values, strict=True)), x)

    results: tuple[Tensor, ...] = _Recomputed.apply(  # type: ignore[no-untyped-call]
        call, x, *adapters.values()
    )
    return results


@dataclass(frozen=True)
class Routing:
    """What the router of one block said: `mix` (N, n) used, `full` (N, n) softmax, `chosen` 0/1."""

    mix: Tensor
    full: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, full: Tensor, chosen: Tensor) -> Routing:
        kept = full * chosen
        return cls(mix=kept / kept.sum(-1, keepdim=True), full=full, chosen=chosen)


class Decoder(nn.Module, ABC):
    """Holds the base's weights, frozen; the adapters come with every call.

    Adapters are keyed by manifest tensor names.
    """

    EMBEDDING: ClassVar[str]
    FIRST_NORM: ClassVar[str]
    """Of a block, before attention; SECOND_NORM before the MLP, FINAL_NORM after all blocks."""
    SECOND_NORM: ClassVar[str]
    FINAL_NORM: ClassVar[str]
    ATTENTION_OUTPUT: ClassVar[str]
    MLP_INPUTS: ClassVar[tuple[str, ...]]
    """The maps whose outputs `activation` takes."""
    MLP_OUTPUT: ClassVar[str]

    def __init__(self, base: Base, mixture: Mixture, longest: int) -> None:
        """
        Args:
            longest: tokens of the longest text, at most the base's positions.
        """
        super().__init__()
        self.mixture = mixture
        self.longest = longest
        self.architecture = base.architecture
        # "transformer.h" -> "transformer." for adapters, "h" for weights, as in `Base.tensors`.
        prefix, _, self.blocks = base.architecture.blocks.rpartition(".")
        self.prefix = f"{prefix}."
        self.weights = nn.ParameterDict()

    # --- what differs between families -------------------------------------------------------

    @abstractmethod
    def embed(self, tokens: Tensor, at: Positions) -> Tensor:
        """(B, T) -> (N, d)"""

    @abstractmethod
    def norm(self, x: Tensor, key: str) -> Tensor:
        """(N, d) -> (N, d)"""

    @abstractmethod
    def linear(self, x: Tensor, key: str) -> Tensor:
        """(N, inputs) -> (N, outputs)"""

    @abstractmethod
    def queries_keys_values(
        self, adapters: Adapters, block: str, x: Tensor, at: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, d) -> (N, H D), (N, K D), (N, K D)"""

    @abstractmethod
    def activation(self, *parts: Tensor) -> Tensor:
        """One (N, inner) per map of MLP_INPUTS -> (N, inner)"""

    # --- the same where nothing is trained (inference.py) ----------------------------------

    @abstractmethod
    def attention_inputs(
        self, stacks: Adapters, block: str, x: Tensor, joined: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(N, d) -> q, k and v as `comigs::cached_attention` takes them, not turned yet.

        Args:
            joined: whether a map that gives all three may be one product. Its weights as integers
                begin with those of its parts, which other programs take; as float32 they would be
                stored besides.
        """

    @abstractmethod
    def rotary(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """Cosines and sines (longest, D / 2) that turn queries and keys, if any do."""

    @abstractmethod
    def fused_norm(self, x: Tensor, key: str) -> Tensor:
        """(N, d) -> (N, d)"""

    @abstractmethod
    def fused_activation(self, *parts: Tensor) -> Tensor:
        """Like `activation`."""

    # --- pieces of a block -----------------------------------------------------------------

    def add(self, key: str, value: Tensor) -> None:
        self.weights[key.replace(".", "_")] = nn.Parameter(value, requires_grad=False)

    def weight(self, key: str) -> Tensor:
        weight: Tensor = self.weights[key.replace(".", "_")]
        return weight

    def lora(self, adapters: Adapters, role: str, key: str) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r) of one expert on one map, or None if it is no target."""
        name = f"{role}/{self.prefix}{key}"
        if f"{name}.lora_A.weight" not in adapters:
            return None
        return adapters[f"{name}.lora_A.weight"], adapters[f"{name}.lora_B.weight"]

    def adapted(self, adapters: Adapters, key: str, x: Tensor) -> Tensor:
        """A map of attention with the generalist's LoRA, which is not routed."""
        y = self.linear(x, key)
        pair = self.lora(adapters, GENERALIST, key)
        return y if pair is None else y + (x @ pair[0].T * self.mixture.scale) @ pair[1].T

    def split_heads(self, y: Tensor, batch: int, heads: int) -> Tensor:
        """(N, heads D) -> (B K, heads / K T, D): head by head, those that share a key together."""
        groups = self.architecture.key_value_heads
        y = y.view(batch, -1, groups, heads // groups, self.architecture.head_dim)
        return y.permute(0, 2, 3, 1, 4).reshape(batch * groups, -1, y.shape[-1])

    def merge_heads(self, y: Tensor, batch: int) -> Tensor:
        """(B K, G T, D) -> (N, H D)"""
        a = self.architecture
        y = y.view(batch, a.key_value_heads, a.heads // a.key_value_heads, -1, a.head_dim)
        return y.permute(0, 3, 1, 2, 4).reshape(-1, a.heads * a.head_dim)

    def causal_mask(self, length: int) -> Tensor:
        """(G T, T), to be added to scores of `split_heads`."""
        mask = torch.full((length, length), NEGATIVE).triu(1)
        return mask.repeat(self.architecture.heads // self.architecture.key_value_heads, 1)

    def route(self, adapters: Adapters, block: str, x: Tensor) -> Routing | None:
        """p = softmax(top-k(W_r x)) (CoMiGS, eq. 1); None with a single expert."""
        n = self.mixture.experts
        if n == 1:
            return None
        logits = x @ adapters[f"{ROUTER}/{self.prefix}{block}.mlp.router.weight"].T
        full = torch.softmax(logits, -1)
        if n <= self.mixture.top_k:
            return Routing(mix=full, full=full, chosen=torch.ones_like(full))
        chosen = self.top_k(logits.detach())
        return Routing.of(full, chosen)

    def top_k(self, logits: Tensor) -> Tensor:
        """1.0 where fewer than k experts are better; an equal one counts if it comes first."""
        columns = [logits[:, j : j + 1] for j in range(self.mixture.experts)]
        chosen = []
        for j, own in enumerate(columns):
            better = [
                1.0 - positive(own - other) if i < j else positive(other - own)
                for i, other in enumerate(columns)
                if i != j
            ]
            chosen.append(torch.clamp(self.mixture.top_k - sum(better[1:], better[0]), 0.0, 1.0))
        return torch.cat(chosen, -1)

    def mix_low_rank(
        self, xs: list[Tensor], pairs: list[tuple[Tensor, Tensor]], routing: Routing | None
    ) -> Tensor:
        """sum_j p_j s B_j A_j x_j, with the weights applied where it is narrow: (N, out).

        `xs` is one (N, in) shared by all experts, or one each.
        """
        n, r, s = len(pairs), self.mixture.rank, self.mixture.scale
        if len(xs) == 1:
            low = xs[0] @ torch.cat([a for a, _ in pairs]).T
        else:
            low = torch.cat([x @ a.T for x, (a, _) in zip(xs, pairs, strict=True)], -1)
        low = low * s
        if routing is not None:
            low = (low.view(-1, n, r) * routing.mix.unsqueeze(-1)).view(-1, n * r)
        return low @ torch.cat([b for _, b in pairs], 1).T

    def mlp(self, adapters: Adapters, block: str, x: Tensor, routing: Routing | None) -> Tensor:
        roles = self.mixture.expert_roles()

        def pairs(name: str) -> list[tuple[Tensor, Tensor]]:
            found = (self.lora(adapters, role, f"{block}.{name}") for role in roles)
            return [pair for pair in found if pair]

        parts = [self.linear(x, f"{block}.{name}") for name in self.MLP_INPUTS]
        input_pairs = [pairs(name) for name in self.MLP_INPUTS]
        if self.mixture.mixing == "per_linear" or routing is None or not any(input_pairs):
            parts = [
                part + self.mix_low_rank([x], each, routing) if each else part
                for part, each in zip(parts, input_pairs, strict=True)
            ]
            inner = [self.activation(*parts)]
            mixed = inner[0]
        else:
            # Whole MLPs, mixed at the output. What is frozen is linear there and the weights sum
            # to one, so sum_j p_j (W u_j + b) = W (sum_j p_j u_j) + b: one product for all.
            inner = [
                self.activation(
                    *(
                        part + (x @ each[j][0].T * self.mixture.scale) @ each[j][1].T
                        if each
                        else part
                        for part, each in zip(parts, input_pairs, strict=True)
                    )
                )
                for j in range(len(roles))
            ]
            weighted = [u * routing.mix[:, j : j + 1] for j, u in enumerate(inner)]
            mixed = sum(weighted[1:], weighted[0])
        y = self.linear(mixed, f"{block}.{self.MLP_OUTPUT}")
        output_pairs = pairs(self.MLP_OUTPUT)
        return y + self.mix_low_rank(inner, output_pairs, routing) if output_pairs else y

    def finish_block(
        self, adapters: Adapters, block: str, x: Tensor, attended: Tensor
    ) -> tuple[Tensor, list[Routing]]:
        """Everything of a block after attention: (N, d) and the routing, if there is any."""
        x = x + self.adapted(adapters, f"{block}.{self.ATTENTION_OUTPUT}", attended)
        return self.add_mlp(adapters, block, x)

    def add_mlp(self, adapters: Adapters, block: str, x: Tensor) -> tuple[Tensor, list[Routing]]:
        h = self.norm(x, f"{block}.{self.SECOND_NORM}")
        routing = self.route(adapters, block, h)
        x = x + self.mlp(adapters, block, h, routing)
        return x, [] if routing is None else [routing]

    # --- whole passes ----------------------------------------------------------------------

    def hidden(
        self, adapters: Adapters, tokens: Tensor, *, recompute: bool = False
    ) -> tuple[Tensor, list[Routing]]:
        """`tokens` (B, T) -> final hidden states (N, d) and every block's routing.

        With `recompute`, of a block only what enters attention and MLP is kept for the gradient.
        """
        b, t = tokens.shape
        x = self.embed(tokens, slice(t))
        mask = self.causal_mask(t)
        routings = []
        for layer in range(self.architecture.layers):
            block = f"{self.blocks}.{layer}"
            own = {n: v for n, v in adapters.items() if f"/{self.prefix}{block}." in n}
            attention = partial(self._attention_half, block=block, batch=b, mask=mask)
            for half in (attention, partial(self._mlp_half, block=block)):
                x, *routing = _recomputed(half, own, x) if recompute else half(own, x)
            routings += [Routing.of(*routing)] if routing else []
        return self.norm(x, self.FINAL_NORM), routings

    def _attention_half(
        self, adapters: Adapters, x: Tensor, *, block: str, batch: int, mask: Tensor
    ) -> tuple[Tensor, ...]:
        return (self.add_attention(adapters, block, x, batch, mask),)

    def _mlp_half(self, adapters: Adapters, x: Tensor, *, block: str) -> tuple[Tensor, ...]:
        x, routings = self.add_mlp(adapters, block, x)
        return x, *(part for r in routings for part in (r.full, r.chosen))

    def add_attention(
        self, adapters: Adapters, block: str, x: Tensor, batch: int, mask: Tensor
    ) -> Tensor:
        """The first half of a block on whole sequences, (N, d) -> (N, d)."""
        a = self.architecture
        normed = self.norm(x, f"{block}.{self.FIRST_NORM}")
        q, k, v = self.queries_keys_values(adapters, block, normed, slice(mask.shape[1]))
        q, k, v = (
            self.split_heads(y, batch, heads)
            for y, heads in ((q, a.heads), (k, a.key_value_heads), (v, a.key_value_heads))
        )
        scores = q @ k.mT / math.sqrt(a.head_dim) + mask
        attended = self.merge_heads(torch.softmax(scores, -1) @ v, batch)
        return x + self.adapted(adapters, f"{block}.{self.ATTENTION_OUTPUT}", attended)

    def head(self) -> Tensor:
        """(V, d): the output embedding, tied to the input's unless the base has its own."""
        tied = "lm_head_weight" not in self.weights
        return self.weight(f"{self.EMBEDDING}.weight" if tied else "lm_head.weight")

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token in nats, (N,)."""
        losses: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden, self.head(), targets.reshape(-1)
        )
        return losses

    def balance(self, routings: list[Routing]) -> Tensor:
        """[f_0 P_0 + (n-1) sum_{j>0} f_j P_j] / ((n-1)^2 + 1), mean over blocks (CoMiGS, eq. 10).

        f is the share of tokens that chose the expert, P its mean probability in the full softmax.
        """
        n = self.mixture.experts
        factors = torch.tensor([1.0] + [float(n - 1)] * (n - 1)) / ((n - 1) ** 2 + 1)
        per_block = [
            (r.chosen.sum(0) * r.full.sum(0) * factors).sum() / r.full.shape[0] ** 2
            for r in routings
        ]
        return sum(per_block[1:], per_block[0]) / len(per_block)

    def loss(
        self, adapters: Adapters, tokens: Tensor, targets: Tensor, *, recompute: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(training loss, its cross-entropy), both scalars, in nats per token."""
        hidden, routings = self.hidden(adapters, tokens, recompute=recompute)
        cross_entropy = self.token_losses(hidden, targets).sum() / targets.numel()
        if not routings or self.mixture.balance_weight == 0:
            return cross_entropy + 0.0, cross_entropy
        return cross_entropy + self.mixture.balance_weight * self.balance(routings), cross_entropy

    def extend(
        self,
        adapters: Adapters,
        tokens: Tensor,
        position: Tensor,
        last: Tensor,
        cache: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[Routing], list[tuple[Tensor, Tensor]]]:
        """Continues a text by T tokens on top of a KV cache.

        Args:
            tokens: (T,), the new tokens; what comes after `last` is padding.
            position: (1,), how many entries of the cache are filled.
            last: (1,), index of the last real token.
            cache: per block, keys and values, each (K, C, D); entries from `position` on are
                ignored, whatever they hold.

        Returns:
            Logits (V,) after `last`, every block's routing, and per block the new keys and
            values, each (K, T, D), for the caller to store from `position` on.
        """
        t, c = tokens.shape[0], cache[0][0].shape[1]
        a = self.architecture
        at = torch.clamp(position + torch.arange(t), max=self.longest - 1)
        past = (torch.arange(c) >= position).to(self.head().dtype) * NEGATIVE  # (C,)
        future = self.causal_mask(t)
        x = self.embed(tokens.unsqueeze(0), at)
        routings, fresh = [], []
        for layer, (old_k, old_v) in enumerate(cache):
            block = f"{self.blocks}.{layer}"
            normed = self.norm(x, f"{block}.{self.FIRST_NORM}")
            q, k, v = self.queries_keys_values(adapters, block, normed, at)
            q = self.split_heads(q, 1, a.heads) / math.sqrt(a.head_dim)
            k, v = (self.split_heads(y, 1, a.key_value_heads) for y in (k, v))
            fresh.append((k, v))
            # Scores over the cache and over the new tokens side by side: nothing is copied.
            scores = torch.cat([q @ old_k.mT + past, q @ k.mT + future], -1)
            p = torch.softmax(scores, -1)
            attended = self.merge_heads(p[..., :c] @ old_v + p[..., c:] @ v, 1)
            x, routing = self.finish_block(adapters, block, x, attended)
            routings += routing
        if t > 1:
            x = x.index_select(0, last)
        final = self.norm(x, self.FINAL_NORM)
        return (final @ self.head().T).squeeze(0), routings, fresh
