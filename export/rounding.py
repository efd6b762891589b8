"""Eight bits: of weights, and where activations do not fit into them.

Real bases hold a few activations that are thousands of times larger than a token's others (Sun et
al. 2024, "Massive activations in large language models"). Rounded on one scale with them, the
others are lost, and with them what every other token attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from export.flat_graph import ATEN, untransposed

# Largest error, relative, of a token's outputs. Without such activations most are below it.
ALLOWED = 0.03
# The same where activations share scales in blocks, and smaller blocks cost little.
ALLOWED_IN_BLOCKS = 0.01


def eight_bits(value: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (outputs, inputs) as int8 and a float32 scale for each output."""
    scales = value.abs().amax(1).clamp(min=1e-12) / 127.0
    return torch.round(value / scales.unsqueeze(1)).to(torch.int8), scales


def coarse_products(
    graph_module: fx.GraphModule,
    arguments: Sequence[Tensor],
    quantised: Callable[[fx.Node], bool],
    block: Callable[[int], int] | None = None,
) -> set[fx.Node]:
    """Products with quantised weights for which rounding each token on these scales is too coarse.

    Args:
        arguments: what to run the graph on.
        quantised: whether a node is a weight that is held in int8.
        block: of how many activations of a token, how many share a scale (default: all).
    """
    rounding = _Rounding(graph_module, quantised, block)
    with torch.no_grad():
        rounding.run(*arguments)
    return rounding.coarse


class _Rounding(fx.Interpreter):
    """Runs a graph in float32 and, beside it, each product once more with a rounded factor."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        quantised: Callable[[fx.Node], bool],
        block: Callable[[int], int] | None,
    ) -> None:
        super().__init__(graph_module)
        self.block = block or int
        self.allowed = ALLOWED_IN_BLOCKS if block else ALLOWED
        self.quantised = quantised
        self.coarse: set[fx.Node] = set()
        self.scales: dict[Any, tuple[bool, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target == ATEN.mm.default:
            a, b = n.args
            assert isinstance(a, fx.Node)
            assert isinstance(b, fx.Node)
            weight = untransposed(b)
            if self.quantised(weight):
                x, transposed = self.env[a], weight is not b
                if self._worst_error(weight.target, x, self.env[b], transposed) > self.allowed:
                    self.coarse.add(n)
        return result

    def _worst_error(self, weight: Any, x: Tensor, factor: Tensor, transposed: bool) -> float:
        if weight not in self.scales:
            self.scales[weight] = (transposed, factor.abs().amax(0).clamp(min=1e-12))
        forward, scales = self.scales[weight]
        if transposed != forward:  # the backward pass: scales per output belong to x then
            x, factor = x * scales, factor / scales.unsqueeze(1)
        blocks = x.view(len(x), -1, self.block(x.shape[1]))
        step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) * (2.0 / 255.0)
        error = (torch.round(blocks / step) * step - blocks).view(x.shape)
        wanted = (x @ factor).norm(dim=1).clamp(min=1e-30)
        return float(((error @ factor).norm(dim=1) / wanted).max())
