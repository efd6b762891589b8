"""Eight bits: of weights, and where activations do not fit into them.

Real bases hold a few activations that are thousands of times larger than a token's others (Sun et
al. 2024, "Massive activations in large language models"). Rounded on one scale with them, the
others are lost, and with them what every other token attends to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from export.flat_graph import ATEN, is_transpose, untransposed

# Tables of which rows are looked up, in numbers: embeddings, but not the angles of positions.
SMALLEST_EMBEDDING = 2**20
# Largest error, relative, of a token's outputs. Without such activations most are below it.
ALLOWED = 0.03
# How much larger it may be if all tokens share a scale, which saves bringing each to one.
AS_WELL = 1.5
OWN, TOGETHER = 0, 1  # ways to round: each token on a scale of its own, or all on one
# The same where activations share scales in blocks, of which smaller ones cost little.
ALLOWED_IN_BLOCKS = 0.0125


_Key: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], bool]
Judged: TypeAlias = dict[_Key, tuple[bool, torch.UntypedStorage]]
"""Of weights of a base, each way round: whether rounding is too coarse for the other factor. What
memory they have is kept, so that nothing else can be there."""
Steps: TypeAlias = dict[int, Tensor]
"""Of each way to round (N, inputs): the width of a step, for every number or for rows of them."""


def eight_bits(value: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (outputs, inputs) as int8 and a float32 scale for each output."""
    scales = value.abs().amax(1).clamp(min=1e-12) / 127.0
    return torch.round(value / scales.unsqueeze(1)).to(torch.int8), scales


def coarse_products(
    graph_module: fx.GraphModule,
    examples: Sequence[Sequence[Tensor]],
    quantised: Callable[[fx.Node], bool],
    judged: Judged,
) -> set[fx.Node]:
    """Products with quantised weights for which rounding each token on one scale is too coarse.

    Args:
        examples: what to run the graph on, if a product is not among the `judged`.
        quantised: whether a node is a weight that is held in int8.
        judged: what other graphs have shown, and of as many tokens or more, since they share the
            steps of a scale; what this one shows is added.
    """
    keys = {node: _key(graph_module, node) for node in _products(graph_module, quantised)}
    new = set(keys.values()) - judged.keys()
    # Both ways round of a weight: which one is forward, the first that is looked at tells.
    weights = {key[:-1] for key in new}
    products = {node for node, key in keys.items() if key[:-1] in weights}
    of_these = _errors(graph_module, examples, products, _steps_of_each_token)
    for node, errors in of_these if new else ():
        key = keys[node]
        if key in new:
            before = key in judged and judged[key][0]
            storage = _weight(graph_module, node).untyped_storage()
            judged[key] = before or errors[OWN] > ALLOWED, storage
    return {node for node, key in keys.items() if judged[key][0]}


def _products(graph_module: fx.GraphModule, quantised: Callable[[fx.Node], bool]) -> set[fx.Node]:
    return {
        node
        for node in graph_module.graph.nodes
        if node.target == ATEN.mm.default and quantised(untransposed(node.args[1]))
    }


def _key(graph_module: fx.GraphModule, product: fx.Node) -> _Key:
    """Where the weight of a product is, and which way round."""
    weight, factor = _weight(graph_module, product), product.args[1]
    assert isinstance(factor, fx.Node)
    return weight.data_ptr(), tuple(weight.shape), weight.stride(), is_transpose(factor)


def _weight(graph_module: fx.GraphModule, product: fx.Node) -> Tensor:
    factor = product.args[1]
    assert isinstance(factor, fx.Node)
    weight: Tensor = getattr(graph_module, str(untransposed(factor).target))
    return weight


def coarse_and_even_products(
    graph_module: fx.GraphModule,
    examples: Sequence[Sequence[Tensor]],
    quantised: Callable[[fx.Node], bool],
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Products with quantised weights for which rounding each token on one scale is too coarse, and
    those for which all tokens may as well be on one.

    Args:
        examples, quantised: as above.
    """
    products = _products(graph_module, quantised)
    coarse: set[fx.Node] = set()
    uneven: set[fx.Node] = set()
    for node, errors in _errors(graph_module, examples, products, _steps_of_tokens):
        own, together = errors[OWN], errors[TOGETHER]
        if own > ALLOWED:
            coarse.add(node)
        if together > min(ALLOWED, AS_WELL * own):
            uneven.add(node)
    # What is rounded once for several products is rounded in one way.
    factors = {node.args[0] for node in coarse | uneven}
    return coarse, {node for node in products if node.args[0] not in factors}


def _steps_of_tokens(weight: str, x: Tensor) -> Steps:
    """Between the lowest and the highest number there are 255: of all, or, where each token is
    brought to the same size first, of all then."""
    return {**_steps_of_each_token(weight, x), TOGETHER: _width(x)}


def _steps_of_each_token(_: str, x: Tensor) -> Steps:
    size = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return {OWN: size * _width(x / size)}


def _width(x: Tensor) -> Tensor:
    return (x.max().clamp(min=0.0) - x.min().clamp(max=0.0)).clamp(min=1e-30) / 255.0


def block_lengths(
    graph_module: fx.GraphModule,
    examples: Sequence[Sequence[Tensor]],
    quantised: Callable[[fx.Node], bool],
    lengths: Callable[[str, int], Sequence[int]],
) -> dict[fx.Node, int]:
    """Of each product with a quantised weight, how many activations of a token may share a scale.

    Args:
        examples, quantised: as above.
        lengths: what there is to choose from for a weight with so many inputs, falling. If even the
            last is too coarse, it is taken.
    """

    def steps(weight: str, x: Tensor) -> Steps:
        found = {}
        for length in lengths(weight, x.shape[1]):
            largest = x.view(len(x), -1, length).abs().amax(-1)
            step = largest.clamp(min=1e-30) * (2.0 / 255.0)
            found[length] = step.repeat_interleave(length, 1)
        return found

    chosen: dict[fx.Node, int] = {}
    products = _products(graph_module, quantised)
    for node, errors in _errors(graph_module, examples, products, steps):
        fitting = (length for length, error in errors.items() if error <= ALLOWED_IN_BLOCKS)
        length = next(fitting, min(errors))
        chosen[node] = min(length, chosen.get(node, length))
    return chosen


def _errors(
    graph_module: fx.GraphModule,
    examples: Sequence[Sequence[Tensor]],
    products: set[fx.Node],
    steps: Callable[[str, Tensor], Steps],
) -> Iterator[tuple[fx.Node, dict[int, float]]]:
    """For every example and each of these products: by how much each way to round misses its
    outputs.

    Relative errors of the whole output of a token, the worst of all tokens."""
    for arguments in examples:
        rounding = _Rounding(graph_module, products, steps)
        with torch.no_grad():
            rounding.run(*arguments)
        yield from rounding.errors.items()


class _Rounding(fx.Interpreter):
    """Runs a graph in float32 and, beside it, each product once more with a rounded factor."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        products: set[fx.Node],
        steps: Callable[[str, Tensor], Steps],
    ) -> None:
        super().__init__(graph_module)
        self.products = products
        self.steps = steps
        self.errors: dict[fx.Node, dict[int, float]] = {}
        self.scales: dict[str, tuple[bool, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.products:
            a, b = n.args
            assert isinstance(a, fx.Node)
            assert isinstance(b, fx.Node)
            weight = untransposed(b)
            self.errors[n] = self._worst_errors(
                str(weight.target), self.env[a], self.env[b], weight is not b, result
            )
        return result

    def _worst_errors(
        self, weight: str, x: Tensor, factor: Tensor, transposed: bool, product: Tensor
    ) -> dict[int, float]:
        if weight not in self.scales:
            self.scales[weight] = (transposed, factor.abs().amax(0).clamp(min=1e-12))
        forward, scales = self.scales[weight]
        backward = transposed != forward  # scales per output belong to x then
        x = x * scales if backward else x
        wanted = product.norm(dim=1).clamp(min=1e-30)
        errors = {}
        for way, step in self.steps(weight, x).items():
            error = torch.round(x / step) * step - x
            error = error / scales if backward else error
            errors[way] = float(((error @ factor).norm(dim=1) / wanted).max())
        return errors
