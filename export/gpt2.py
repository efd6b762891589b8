"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config

from export.base import Base
from export.decoder import Adapters, Decoder, Positions
from export.inference import adapted, stacked
from export.mixture import GENERALIST, Mixture

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


class GPT2(Decoder):
    """Learned positions, layer norm, one map for queries, keys and values, an MLP of two maps."""

    EMBEDDING = "wte"
    FIRST_NORM, SECOND_NORM, FINAL_NORM = "ln_1", "ln_2", "ln_f"
    ATTENTION_OUTPUT = "attn.c_proj"
    MLP_INPUTS, MLP_OUTPUT = ("mlp.c_fc",), "mlp.c_proj"

    def __init__(self, base: Base, mixture: Mixture, longest: int) -> None:
        super().__init__(base, mixture, longest)
        assert isinstance(base.config, GPT2Config)
        self.epsilon = base.config.layer_norm_epsilon
        for key, value in base.tensors.items():
            stem, kind = key.rsplit(".", 1)
            if stem.endswith("attn.c_attn"):
                # A weight each, so that nothing has to be split at run time.
                for part, piece in zip("qkv", value.tensor_split(3, dim=-1), strict=True):
                    self.add(f"{stem}.{part}.{kind}", piece.contiguous())
            else:
                self.add(key, value)

    def embed(self, tokens: Tensor, at: Positions) -> Tensor:
        width = self.architecture.width
        x = self.weight("wte.weight")[tokens.reshape(-1)].view(*tokens.shape, width)
        return (x + self.weight("wpe.weight")[at]).view(-1, width)

    def norm(self, x: Tensor, key: str) -> Tensor:
        weight, bias = self.weight(f"{key}.weight"), self.weight(f"{key}.bias")
        return F.layer_norm(x, (self.architecture.width,), weight, bias, self.epsilon)

    def linear(self, x: Tensor, key: str) -> Tensor:
        return x @ self.weight(f"{key}.weight") + self.weight(f"{key}.bias")

    def queries_keys_values(
        self, adapters: Adapters, block: str, x: Tensor, at: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        key, width = f"{block}.attn.c_attn", self.architecture.width
        q, k, v = (self.linear(x, f"{key}.{part}") for part in "qkv")
        pair = self.lora(adapters, GENERALIST, key)
        if pair is None:
            return q, k, v
        low = x @ pair[0].T * self.mixture.scale
        rows = [pair[1][i * width : (i + 1) * width] for i in range(3)]
        return q + low @ rows[0].T, k + low @ rows[1].T, v + low @ rows[2].T

    def activation(self, *parts: Tensor) -> Tensor:
        return gelu(*parts)

    def attention_inputs(
        self, stacks: Adapters, block: str, x: Tensor, joined: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        key, width = f"{block}.attn.c_attn", self.architecture.width
        if joined:
            for kind in ("weight", "bias"):
                if f"{key}.{kind}".replace(".", "_") not in self.weights:
                    parts = [self.weight(f"{key}.{part}.{kind}") for part in "qkv"]
                    self.add(f"{key}.{kind}", torch.cat(parts, -1))
            return adapted(self, stacks, key, x), None, None
        q, k, v = (self.linear(x, f"{key}.{part}") for part in "qkv")
        pair = stacked(self, stacks, key)
        if pair is None:
            return q, k, v
        low = x @ pair[0].T
        columns = [pair[1][:, i * width : (i + 1) * width] for i in range(3)]
        return q + low @ columns[0], k + low @ columns[1], v + low @ columns[2]

    def rotary(self) -> tuple[()]:
        return ()

    def fused_norm(self, x: Tensor, key: str) -> Tensor:
        return self.norm(x, key)

    def fused_activation(self, *parts: Tensor) -> Tensor:
        (x,) = parts
        return F.gelu(x, approximate="tanh")
