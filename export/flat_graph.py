"""A program as one flat graph of aten operators, forward and backward, for the compilers.

The gradients that autograd leaves as operators of their own are written out in operators that
inference engines have; how a row is summed is the engine's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from export.programs import Specification

ATEN = torch.ops.aten
IDENTITIES = {ATEN.detach.default, ATEN.alias.default, ATEN.lift_fresh_copy.default}
TRANSPOSES = {ATEN.t.default, ATEN.permute.default, ATEN.transpose.int}
SHAPING = {ATEN.view.default, ATEN.expand.default}
BROADCASTING = {ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor}

# make_fx takes NotImplemented for "leave this one as it is".
Rewritten: TypeAlias = Any
Decompositions: TypeAlias = Mapping[Any, Callable[..., Rewritten]]


def flat_graph(
    specification: Specification, arguments: Sequence[Tensor], decompositions: Decompositions
) -> fx.GraphModule:
    """Traces `specification`; the base's weights are attributes of the module that is returned.

    Every node has an example of its value in `meta["val"]`.
    """
    graph_module = make_fx(
        specification.call,
        decomposition_table=dict(decompositions),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )(*arguments)
    _drop_identities(graph_module)
    _fold_constants(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def results_of(graph_module: fx.GraphModule) -> list[Tensor]:
    """Of the shapes and dtypes of what a flat graph returns."""
    results: Any = graph_module.graph.output_node().args[0]
    return [node.meta["val"] for node in results]


def decompositions(row_sums: Callable[[Tensor], Tensor]) -> dict[Any, Callable[..., Rewritten]]:
    """Gradients and changes of shape in plainer operators.

    Args:
        row_sums: (..., K) -> (..., 1).
    """

    def layer_norm_gradient(
        gradient: Tensor,
        x: Tensor,
        shape: Sequence[int],
        mean: Tensor,
        reciprocal: Tensor,
        weight: Tensor,
        bias: Tensor,
        wanted: Sequence[bool],
    ) -> Rewritten:
        if wanted[1] or wanted[2]:
            return NotImplemented  # the base is frozen
        share = 1.0 / x.shape[-1]
        normal = (x - mean) * reciprocal
        g = gradient * weight
        inner = g - row_sums(g) * share - normal * (row_sums(g * normal) * share)
        return inner * reciprocal, None, None

    def softmax_gradient(gradient: Tensor, p: Tensor, dim: int, dtype: torch.dtype) -> Rewritten:
        if dim % p.dim() != p.dim() - 1:
            return NotImplemented
        weighted = gradient * p
        return weighted - p * row_sums(weighted)

    return {
        ATEN.native_layer_norm_backward.default: layer_norm_gradient,
        ATEN._softmax_backward_data.default: softmax_gradient,
        ATEN.slice_backward.default: _slice_gradient,
        ATEN.squeeze.dim: _squeeze,
        ATEN.unsqueeze.default: _unsqueeze,
    }


def _slice_gradient(
    gradient: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Rewritten:
    if step != 1:
        return NotImplemented
    dim %= len(sizes)
    after = sizes[dim] - min(end, sizes[dim])
    # Pads are counted from the last dimension.
    return ATEN.constant_pad_nd(gradient, [0, 0] * (len(sizes) - 1 - dim) + [start, after])


def _squeeze(x: Tensor, dim: int) -> Rewritten:
    dim %= x.dim()
    return x.reshape(*x.shape[:dim], *x.shape[dim + 1 :]) if x.shape[dim] == 1 else NotImplemented


def _unsqueeze(x: Tensor, dim: int) -> Rewritten:
    dim %= x.dim() + 1
    return x.reshape(*x.shape[:dim], 1, *x.shape[dim:])


def _drop_identities(graph_module: fx.GraphModule) -> None:
    """Removes nodes that change nothing, or nothing that their users would notice."""
    for node in list(graph_module.graph.nodes):
        if node.target == ATEN._unsafe_view.default:
            node.target = ATEN.view.default
        elif node.target == ATEN.cat.default and len(node.args[0]) == 1:
            node.replace_all_uses_with(node.args[0][0])
            graph_module.graph.erase_node(node)
        elif is_transpose(node) and is_transpose(node.args[0]):
            # Autograd keeps the W.T of x @ W.T, and multiplies by its transpose.
            node.replace_all_uses_with(node.args[0].args[0])
            graph_module.graph.erase_node(node)
        elif (
            node.target in IDENTITIES
            or (node.target in SHAPING and _same_shape(node.args[0], node))
            or (node.target == ATEN.expand.default and all(map(_broadcasts(node), node.users)))
        ):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def is_transpose(node: fx.Node) -> bool:
    return node.target in TRANSPOSES and axes_of(node) == [1, 0]


def untransposed(node: fx.Node) -> fx.Node:
    """The matrix that `node` is, or is the transpose of."""
    (matrix,) = node.all_input_nodes if is_transpose(node) else (node,)
    return matrix


def axes_of(node: fx.Node) -> list[int]:
    """The permutation that a node of TRANSPOSES is."""
    rank = node.meta["val"].dim()
    arguments: Any = node.args[1:] or (0, 1)  # aten.t has none
    if node.target == ATEN.permute.default:
        return [axis % rank for axis in arguments[0]]
    axes = list(range(rank))
    one, other = arguments
    axes[one], axes[other] = axes[other], axes[one]
    return axes


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta["val"].shape == other.meta["val"].shape)


def _broadcasts(expanded: fx.Node) -> Callable[[fx.Node], bool]:
    """Whether a user of `expanded` gives the same without the expansion."""

    def check(user: fx.Node) -> bool:
        others = [a for a in user.args if isinstance(a, fx.Node) and a is not expanded]
        return user.target in BROADCASTING and any(_same_shape(user, other) for other in others)

    return check


def _fold_constants(graph_module: fx.GraphModule) -> None:
    """Computes what depends on no argument and no weight (masks, columns of ones) once, here."""
    values: dict[fx.Node, Tensor] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        example = node.meta["val"]
        if node.target == ATEN.ones_like.default:
            values[node] = torch.ones(example.shape, dtype=example.dtype)
        elif node.target == ATEN.zeros_like.default:
            values[node] = torch.zeros(example.shape, dtype=example.dtype)
        elif all(i in values for i in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    names: dict[tuple[Any, ...], str] = {}
    for node, value in values.items():
        # Tensors of the same content are one.
        key = (value.dtype, value.shape, value.numpy().tobytes())
        if key not in names:
            names[key] = f"_constant_{len(names)}"
            graph_module.register_buffer(names[key], value.contiguous())
        with graph_module.graph.inserting_before(node):
            constant = graph_module.graph.get_attr(names[key])
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
    for node in reversed(values):
        graph_module.graph.erase_node(node)
