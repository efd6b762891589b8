"""The Llama family (Touvron et al. 2023): also SmolLM, TinyLlama and others that use its layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from export.base import Base
from export.decoder import Adapters, Decoder, Positions
from export.inference import adapted
from export.mixture import Mixture


class _Silu(torch.autograd.Function):
    """y = x s with s = sigmoid(x); its slope is s + y (1 - s) (Elfwing et al. 2017)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        y = x * s
        ctx.save_for_backward(s, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        s, y = ctx.saved_tensors
        slope: Tensor = s + (y - y * s)
        return gradient * slope


class _RmsNorm(torch.autograd.Function):
    """w x / rms(x), for a frozen w (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        share = 1.0 / x.shape[-1]
        reciprocal = torch.rsqrt((x * x).sum(-1, keepdim=True) * share + epsilon)
        normal = x * reciprocal
        ctx.save_for_backward(normal, reciprocal, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        normal, reciprocal, weight = ctx.saved_tensors
        g = gradient * weight
        along = (g * normal).sum(-1, keepdim=True) * (1.0 / normal.shape[-1])
        return (g - normal * along) * reciprocal, None, None


class Llama(Decoder):
    """Rotary positions, RMS norm, grouped queries, a gated MLP of three maps."""

    EMBEDDING = "embed_tokens"
    FIRST_NORM, SECOND_NORM, FINAL_NORM = "input_layernorm", "post_attention_layernorm", "norm"
    ATTENTION_OUTPUT = "self_attn.o_proj"
    MLP_INPUTS, MLP_OUTPUT = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"

    def __init__(self, base: Base, mixture: Mixture, longest: int) -> None:
        super().__init__(base, mixture, longest)
        assert isinstance(base.config, LlamaConfig)
        self.epsilon = base.config.rms_norm_eps
        for key, value in base.tensors.items():
            self.add(key, value)
        # transformers knows the ways to stretch positions; D / 2 frequencies come out.
        rotary = LlamaRotaryEmbedding(base.config)
        angles = torch.outer(torch.arange(longest).float(), rotary.inv_freq)
        angles = torch.cat([angles, angles], -1)  # (longest, D)
        self.add("rotary.cos", angles.cos() * rotary.attention_scaling)
        self.add("rotary.sin", angles.sin() * rotary.attention_scaling)
        # x @ turn is (-x2, x1) of x = (x1, x2). As a product it has a product for a gradient.
        half = base.architecture.head_dim // 2
        one, zero = torch.eye(half), torch.zeros(half, half)
        self.add("rotary.turn", torch.cat([torch.cat([zero, one], 1), torch.cat([-one, zero], 1)]))

    def embed(self, tokens: Tensor, at: Positions) -> Tensor:
        return self.weight("embed_tokens.weight")[tokens.reshape(-1)]

    def norm(self, x: Tensor, key: str) -> Tensor:
        y: Tensor = _RmsNorm.apply(  # type: ignore[no-untyped-call]
            x, self.weight(f"{key}.weight"), self.epsilon
        )
        return y

    def linear(self, x: Tensor, key: str) -> Tensor:
        y = x @ self.weight(f"{key}.weight").T
        biased = f"{key}.bias".replace(".", "_") in self.weights
        return y + self.weight(f"{key}.bias") if biased else y

    def queries_keys_values(
        self, adapters: Adapters, block: str, x: Tensor, at: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.adapted(adapters, f"{block}.self_attn.{part}_proj", x) for part in "qkv")
        return self.rotated(q, at), self.rotated(k, at), v

    def rotated(self, y: Tensor, at: Positions) -> Tensor:
        """Turns each pair of numbers of a head by its angle at the token's position. (N, H D)"""
        cos, sin = self.weight("rotary.cos")[at], self.weight("rotary.sin")[at]  # (T, D)
        t, dim = cos.shape
        heads = y.view(-1, dim)
        turned = (heads @ self.weight("rotary.turn")).view(-1, t, y.shape[-1] // dim, dim)
        result = heads.view(turned.shape) * cos.view(t, 1, dim) + turned * sin.view(t, 1, dim)
        return result.view(y.shape)

    def activation(self, *parts: Tensor) -> Tensor:
        gate, up = parts
        opened: Tensor = _Silu.apply(gate)  # type: ignore[no-untyped-call]
        return opened * up

    def attention_inputs(
        self, stacks: Adapters, block: str, x: Tensor, joined: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        q, k, v = (adapted(self, stacks, f"{block}.self_attn.{part}_proj", x) for part in "qkv")
        return q, k, v

    def rotary(self) -> tuple[Tensor, Tensor]:
        half = self.architecture.head_dim // 2
        return self.weight("rotary.cos")[:, :half], self.weight("rotary.sin")[:, :half]

    def fused_norm(self, x: Tensor, key: str) -> Tensor:
        y: Tensor = torch.ops.comigs.rms_norm(x, self.weight(f"{key}.weight"), self.epsilon)
        return y

    def fused_activation(self, *parts: Tensor) -> Tensor:
        gate, up = parts
        opened: Tensor = F.silu(gate) * up
        return opened
