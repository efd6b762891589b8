"""GPT-2 with a mixture of LoRA experts, as functions of the adapters.

Shapes: N tokens (B sequences of T), d width, H heads, D = d / H, V vocabulary, n experts, r rank,
C length of the KV cache. Activations stay two-dimensional (N, d) outside attention, so that every
product is a plain matrix product; what the exporters get wrong or slow is written out by hand:

* the loss is logsumexp(logits) - <h, W[target]>, in chunks: no array of N x V, no scatter;
* queries, keys and values have a weight each, so nothing is split;
* top-k is a rank by comparison: no TopK, no scatter, ties go to the lower index on every engine;
* GELU is a sigmoid: see `gelu`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.base import Base
from export.mixture import GENERALIST, Mixture

Adapters = Mapping[str, Tensor]
LOGITS_AT_ONCE = 4 * 2**20  # numbers; 16 MiB
NEGATIVE = -1e9  # an exponent of zero that survives arithmetic, unlike -inf


GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715 * GELU_SLOPE


class _Gelu(torch.autograd.Function):
    """x sigmoid(z) with z = a x + b x^3; its slope is s + y (1 - s) (a + 3 b x^2).

    The gradient is written out since there it takes half the passes of autograd's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x * x
        s = torch.sigmoid(x * (square * GELU_CUBIC + GELU_SLOPE))
        y = x * s
        ctx.save_for_backward(square, s, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        square, s, y = ctx.saved_tensors
        slope: Tensor = s + (y - y * s) * (square * (3.0 * GELU_CUBIC) + GELU_SLOPE)
        return gradient * slope


def gelu(x: Tensor) -> Tensor:
    """GPT-2's tanh GELU as x sigmoid(2u), with 1 + tanh(u) = 2 sigmoid(2u) (Hendrycks 2016).

    XNNPACK takes aten.gelu in either form and computes the erf one: off by 5e-4, silently.
    """
    y: Tensor = _Gelu.apply(x)  # type: ignore[no-untyped-call]
    return y


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


@dataclass(frozen=True)
class Routing:
    """What the router of one block said: `mix` (N, n) used, `full` (N, n) softmax, `chosen` 0/1."""

    mix: Tensor
    full: Tensor
    chosen: Tensor


class Decoder(nn.Module):
    """Holds the base's weights, frozen; the adapters come with every call.

    Adapters are keyed by manifest tensor names.
    """

    def __init__(self, base: Base, mixture: Mixture) -> None:
        super().__init__()
        config = base.config
        self.mixture = mixture
        self.layers, self.heads, self.width = config.n_layer, config.n_head, config.n_embd
        self.head_dim = self.width // self.heads
        self.epsilon = config.layer_norm_epsilon
        self.positions = config.n_positions
        self.weights = nn.ParameterDict()
        for key, value in base.tensors.items():
            if key.endswith("attn.c_attn.weight") or key.endswith("attn.c_attn.bias"):
                stem, kind = key.rsplit(".", 1)
                for part, piece in zip("qkv", value.tensor_split(3, dim=-1), strict=True):
                    self._add(f"{stem}.{part}.{kind}", piece.contiguous())
            else:
                self._add(key, value)

    def _add(self, key: str, value: Tensor) -> None:
        self.weights[key.replace(".", "_")] = nn.Parameter(value, requires_grad=False)

    def weight(self, key: str) -> Tensor:
        weight: Tensor = self.weights[key.replace(".", "_")]
        return weight

    # --- pieces of a block -----------------------------------------------------------------

    def norm(self, x: Tensor, key: str) -> Tensor:
        return F.layer_norm(
            x,
            (self.width,),
            self.weight(f"{key}.weight"),
            self.weight(f"{key}.bias"),
            self.epsilon,
        )

    def linear(self, x: Tensor, key: str) -> Tensor:
        return x @ self.weight(f"{key}.weight") + self.weight(f"{key}.bias")

    def lora(self, adapters: Adapters, role: str, key: str) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r) of one expert on one map, or None if it is no target."""
        name = f"{role}/transformer.{key}"
        if f"{name}.lora_A.weight" not in adapters:
            return None
        return adapters[f"{name}.lora_A.weight"], adapters[f"{name}.lora_B.weight"]

    def queries_keys_values(self, adapters: Adapters, layer: int, x: Tensor) -> list[Tensor]:
        """Three of (N, d)."""
        key = f"h.{layer}.attn.c_attn"
        parts = [self.linear(x, f"{key}.{part}") for part in "qkv"]
        pair = self.lora(adapters, GENERALIST, key)
        if pair is not None:
            low = x @ pair[0].T * self.mixture.scale
            rows = [pair[1][i * self.width : (i + 1) * self.width] for i in range(3)]
            parts = [part + low @ row.T for part, row in zip(parts, rows, strict=True)]
        return parts

    def attention_output(self, adapters: Adapters, layer: int, x: Tensor) -> Tensor:
        key = f"h.{layer}.attn.c_proj"
        y = self.linear(x, key)
        pair = self.lora(adapters, GENERALIST, key)
        return y if pair is None else y + (x @ pair[0].T * self.mixture.scale) @ pair[1].T

    def route(self, adapters: Adapters, layer: int, x: Tensor) -> Routing | None:
        """p = softmax(top-k(W_r x)) (CoMiGS, eq. 1); None with a single expert."""
        n = self.mixture.experts
        if n == 1:
            return None
        logits = x @ adapters[f"router/transformer.h.{layer}.mlp.router.weight"].T
        full = torch.softmax(logits, -1)
        if n <= self.mixture.top_k:
            return Routing(mix=full, full=full, chosen=torch.ones_like(full))
        chosen = self.top_k(logits.detach())
        kept = full * chosen
        return Routing(mix=kept / kept.sum(-1, keepdim=True), full=full, chosen=chosen)

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

    def mlp(self, adapters: Adapters, layer: int, x: Tensor, routing: Routing | None) -> Tensor:
        fc, proj = f"h.{layer}.mlp.c_fc", f"h.{layer}.mlp.c_proj"
        roles = self.mixture.expert_roles()
        fc_pairs = [p for role in roles if (p := self.lora(adapters, role, fc))]
        proj_pairs = [p for role in roles if (p := self.lora(adapters, role, proj))]
        up = self.linear(x, fc)
        if self.mixture.mixing == "per_linear" or routing is None or not fc_pairs:
            if fc_pairs:
                up = up + self.mix_low_rank([x], fc_pairs, routing)
            inner = [gelu(up)]
            mixed = inner[0]
        else:
            # Whole MLPs, mixed at the output. What is frozen is linear there and the weights sum
            # to one, so sum_j p_j (W u_j + b) = W (sum_j p_j u_j) + b: one product for all.
            inner = [gelu(up + (x @ a.T * self.mixture.scale) @ b.T) for a, b in fc_pairs]
            weighted = [u * routing.mix[:, j : j + 1] for j, u in enumerate(inner)]
            mixed = sum(weighted[1:], weighted[0])
        y = self.linear(mixed, proj)
        return y + self.mix_low_rank(inner, proj_pairs, routing) if proj_pairs else y

    # --- whole passes ----------------------------------------------------------------------

    def hidden(self, adapters: Adapters, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        """`tokens` (B, T) -> final hidden states (N, d) and every block's routing."""
        b, t = tokens.shape
        x = self.weight("wte.weight")[tokens.reshape(-1)]
        x = (x.view(b, t, self.width) + self.weight("wpe.weight")[:t]).view(b * t, self.width)
        mask = torch.full((t, t), NEGATIVE).triu(1)

        def heads(y: Tensor) -> Tensor:  # (N, d) -> (B, H, T, D)
            return y.view(b, t, self.heads, self.head_dim).transpose(1, 2)

        routings = []
        for layer in range(self.layers):
            q, k, v = self.queries_keys_values(adapters, layer, self.norm(x, f"h.{layer}.ln_1"))
            scores = heads(q) @ heads(k).transpose(-1, -2) / math.sqrt(self.head_dim) + mask
            mixed = torch.softmax(scores, -1) @ heads(v)
            mixed = mixed.transpose(1, 2).reshape(b * t, self.width)
            x = x + self.attention_output(adapters, layer, mixed)
            h = self.norm(x, f"h.{layer}.ln_2")
            routing = self.route(adapters, layer, h)
            if routing is not None:
                routings.append(routing)
            x = x + self.mlp(adapters, layer, h, routing)
        return self.norm(x, "ln_f"), routings

    def head(self) -> Tensor:
        """(V, d): the output embedding, tied to the input's unless the base has its own."""
        tied = "lm_head_weight" not in self.weights
        return self.weight("wte.weight" if tied else "lm_head.weight")

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

    def loss(self, adapters: Adapters, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(training loss, its cross-entropy), both scalars, in nats per token."""
        hidden, routings = self.hidden(adapters, tokens)
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
            cache: per block, keys and values, each (H, C, D); entries from `position` on are
                ignored, whatever they hold.

        Returns:
            Logits (V,) after `last`, every block's routing, and per block the new keys and
            values, each (H, T, D), for the caller to store from `position` on.
        """
        t, c = tokens.shape[0], cache[0][0].shape[1]
        steps = torch.arange(t)
        where = torch.clamp(position + steps, max=self.positions - 1)
        x = self.weight("wte.weight")[tokens] + self.weight("wpe.weight")[where]
        past = (torch.arange(c) >= position).to(x.dtype) * NEGATIVE  # (C,)
        future = torch.full((t, t), NEGATIVE).triu(1)

        def heads(y: Tensor) -> Tensor:  # (T, d) -> (H, T, D)
            return y.view(t, self.heads, self.head_dim).transpose(0, 1)

        routings, fresh = [], []
        for layer, (old_k, old_v) in enumerate(cache):
            parts = self.queries_keys_values(adapters, layer, self.norm(x, f"h.{layer}.ln_1"))
            q, k, v = (heads(part) for part in parts)
            fresh.append((k, v))
            # Scores over the cache and over the new tokens side by side: nothing is copied.
            q = q / math.sqrt(self.head_dim)
            scores = torch.cat([q @ old_k.mT + past, q @ k.mT + future], -1)
            p = torch.softmax(scores, -1)
            mixed = (p[..., :c] @ old_v + p[..., c:] @ v).transpose(0, 1).reshape(t, self.width)
            x = x + self.attention_output(adapters, layer, mixed)
            h = self.norm(x, f"h.{layer}.ln_2")
            routing = self.route(adapters, layer, h)
            if routing is not None:
                routings.append(routing)
            x = x + self.mlp(adapters, layer, h, routing)
        final = self.norm(x.index_select(0, last), "ln_f")
        return (final @ self.head().T).squeeze(0), routings, fresh
