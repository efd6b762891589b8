"""Products with the base's large matrices on integers, as XNNPACK computes them.

x @ W becomes linear(dequantise(quantise(x)), dequantise(W')), which XNNPACK takes for one operator:
activations in eight bits, each token on a scale and a zero point of its own, weights in eight bits
with a scale for each output, or in four with one for each block of inputs. The gradient of x is
such a product, too, with the transposed weights as a second matrix: XNNPACK keeps weights in the
order in which a product reads them, and one order does not serve both.

Rows of an embedding are looked up in eight bits, too, with a scale each: those of its head, where
they are one matrix. They are stored beside it all the same, since what a delegate holds nobody else
can read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

from export.flat_graph import ATEN, is_transpose, untransposed
from export.programs import BLOCK_MULTIPLES, Blocks
from export.rounding import SMALLEST_EMBEDDING, Judged, coarse_products, eight_bits

QUANTISED = torch.ops.quantized_decomposed
SMALLEST_QUANTISED = 2**12  # numbers
BLOCK_MULTIPLE = BLOCK_MULTIPLES["executorch"]
# Activations beyond this multiple of a token's mean magnitude are multiplied apart from the others,
# where rounding both on one scale is too coarse.
OUTLIER = 10.0

Rounded = dict[tuple[Any, ...], tuple[Tensor, ...]]
"""By where a weight lies and how it is held: its integers, scales and zero points."""


def integer_products(
    graph_module: fx.GraphModule,
    examples: Sequence[Sequence[Tensor]],
    blocks: Blocks | None,
    known: Rounded,
    judged: Judged,
) -> None:
    """Rewrites a flat graph, in place.

    Args:
        examples: inputs on which to see which products rounding is too coarse for.
        blocks: how weights are held that are no embedding (default: a scale for each output).
        known: what weights have been rounded to; programs that share weights share it.
        judged: what programs with the same kind of text have shown of what is too coarse.
    """
    graph = graph_module.graph
    products = [node for node in graph.nodes if node.target == ATEN.mm.default]
    factors = {untransposed(node.args[1]).target for node in products}

    def quantised(node: fx.Node) -> bool:
        shape = node.meta["val"].shape
        matrix = node.op == "get_attr" and node.target in factors and min(shape) > 1
        return bool(matrix and shape.numel() >= SMALLEST_QUANTISED)

    coarse = coarse_products(graph_module, examples, quantised, judged)
    embeddings = {n.args[0].target for n in graph.nodes if n.target == ATEN.index.Tensor}
    rewriting = _Rewriting(graph_module, known)
    for node in products:
        weight, embedding = untransposed(node.args[1]), None
        if quantised(weight):
            embedding = weight.target in embeddings
            # Summed over the vocabulary: probabilities, most of them far smaller than a step.
            over_vocabulary = embedding and not is_transpose(node.args[1])
            apart = over_vocabulary or node in coarse
            rewriting.replace(node, apart=apart, blocks=None if embedding else blocks)
    for node in list(graph.nodes):
        if node.target == ATEN.index.Tensor:
            rewriting.look_up(node)
    graph.eliminate_dead_code()
    graph_module.recompile()


class _Rewriting:
    def __init__(self, graph_module: fx.GraphModule, known: Rounded) -> None:
        self.module = graph_module
        self.known = known
        self.graph = graph_module.graph
        self.rounded: dict[fx.Node, fx.Node] = {}

    def replace(self, node: fx.Node, *, apart: bool, blocks: Blocks | None) -> None:
        """Puts integer products in the place of a product.

        Args:
            apart: whether large activations are multiplied apart from the others.
        """
        x, factor = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(factor, fx.Node)
        call, rows = self.graph.call_function, x.meta["val"].shape[0]
        last, bias = (node, None) if apart else _bias_after(node)
        with self.graph.inserting_before(node):
            if apart:
                x = call(ATEN.cat.default, (list(self.split(x)),))
            rounded = self.round(x)
        with self.graph.inserting_before(last):
            factors = (rounded, self.weight(factor, blocks))
            result = call(ATEN.linear.default, factors if bias is None else (*factors, bias))
            if apart:  # one product of both, since weights take longer to read than rows to compute
                parts = [(result, 0, start, start + rows) for start in (0, rows)]
                result = call(ATEN.add.Tensor, tuple(call(ATEN.slice.Tensor, p) for p in parts))
        last.replace_all_uses_with(result)

    def round(self, x: fx.Node) -> fx.Node:
        """x (N, inputs) in eight bits, and back: once for all products that take it."""
        if x not in self.rounded:
            call, low, high = self.graph.call_function, -128, 127
            chosen = call(QUANTISED.choose_qparams_per_token_asymmetric.default, (x, torch.int8))
            scale, zero = (call(operator.getitem, (chosen, i)) for i in (0, 1))
            to = (scale, zero, low, high, torch.int8)
            rounded = call(QUANTISED.quantize_per_token.default, (x, *to))
            back = call(QUANTISED.dequantize_per_token.default, (rounded, *to, torch.float32))
            self.rounded[x] = back
        return self.rounded[x]

    def split(self, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        """x as the sum of what is near a token's mean magnitude, and what is beyond."""
        call, width = self.graph.call_function, x.meta["val"].shape[1]
        share = self.constant(f"mean_{width}", torch.full((width, 1), OUTLIER / width))
        limit = call(ATEN.mm.default, (call(ATEN.abs.default, (x,)), share))
        below = call(ATEN.minimum.default, (x, limit))
        near = call(ATEN.maximum.default, (below, call(ATEN.neg.default, (limit,))))
        return near, call(ATEN.sub.Tensor, (x, near))

    def weight(self, factor: fx.Node, blocks: Blocks | None) -> fx.Node:
        """The second factor of a product as (outputs, inputs), from integers."""
        node = untransposed(factor)
        value: Tensor = getattr(self.module, str(node.target)).detach()
        value = value if node is not factor else value.T
        name = f"{node.target}_{'transposed' if node is factor else 'straight'}"
        inputs = value.shape[1]
        whole = blocks is None or blocks.bits == 8 or inputs % BLOCK_MULTIPLE > 0
        parts = dict(zip(("integers", "scales", "zeros"), self.integers(value, whole), strict=True))
        stored = [self.constant(f"{name}_{part}", each) for part, each in parts.items()]
        if whole:
            back = QUANTISED.dequantize_per_channel.default
            return self.graph.call_function(back, (*stored, 0, -127, 127, torch.int8))
        back = QUANTISED.dequantize_per_channel_group.default
        held = (-8, 7, torch.int8, BLOCK_MULTIPLE, torch.float32)
        return self.graph.call_function(back, (*stored, *held))

    def integers(self, value: Tensor, whole: bool) -> tuple[Tensor, ...]:
        """A weight (outputs, inputs) in integers: these, their scales and zero points.

        Args:
            whole: in eight bits with a scale for each output, not in four in blocks.
        """
        key = (value.data_ptr(), value.shape, value.stride(), whole)
        if key not in self.known:
            rounded = eight_bits(value) if whole else four_bits(value, BLOCK_MULTIPLE)
            zeros = torch.zeros_like(rounded[1]).long()
            self.known[key] = tuple(each.contiguous() for each in (*rounded, zeros))
        return self.known[key]

    def constant(self, name: str, value: Tensor) -> fx.Node:
        self.module.register_buffer(name, value.contiguous())
        return self.graph.get_attr(name)

    def look_up(self, lookup: fx.Node) -> None:
        """Lets a lookup of rows be one of integers and scales, if the matrix is large."""
        node, index = lookup.args
        assert isinstance(node, fx.Node)
        if node.op != "get_attr" or node.meta["val"].numel() < SMALLEST_EMBEDDING:
            return
        value: Tensor = getattr(self.module, str(node.target)).detach()
        integers, scales, _ = self.integers(value, whole=True)
        call = self.graph.call_function
        with self.graph.inserting_before(lookup):
            # By a name of its own: a delegate would take it for its own, and what uses it besides.
            rows = self.constant(f"{node.target}_rows_integers", integers)
            steps = self.constant(f"{node.target}_rows_scales", scales.unsqueeze(1))
            found, step = (call(ATEN.index.Tensor, (each, index)) for each in (rows, steps))
            exact = call(ATEN._to_copy.default, (found,), {"dtype": torch.float32})
            result = call(ATEN.mul.Tensor, (exact, step))
        lookup.replace_all_uses_with(result)


def four_bits(value: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A weight (outputs, inputs) as integers from -8 to 7 and a scale for each `size` inputs.

    XNNPACK's scales are positive, so the largest number of a block may be cut to 7 of 8 steps where
    that is nearer for the block as a whole.

    Returns:
        int8 (outputs, inputs) and float32 (outputs, inputs / size), of values that bfloat16 has.
    """
    blocks = value.reshape(len(value), -1, size)
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    scales, least = largest, torch.full_like(largest, torch.inf)
    for steps in (7.0, 7.5, 8.0):
        candidate = (largest / steps).to(torch.bfloat16).float()
        rounded = torch.round(blocks / candidate).clamp(-8, 7) * candidate
        error = (rounded - blocks).square().sum(-1, keepdim=True)
        scales, least = torch.where(error < least, candidate, scales), torch.minimum(error, least)
    integers = torch.round(blocks / scales).clamp(-8, 7).to(torch.int8)
    return integers.view(value.shape), scales.squeeze(-1)


def _bias_after(product: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What adds a bias to a product and nothing else uses, and the bias; or the product itself."""
    (user, *others) = product.users
    if user.target == ATEN.add.Tensor and not others and not user.kwargs:
        for bias in user.args:
            if isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.meta["val"].dim() == 1:
                return user, bias
    return product, None
