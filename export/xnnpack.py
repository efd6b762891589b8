"""Rewrites a flat graph in the operators that XNNPACK runs, so that a program is one delegate.

Whatever XNNPACK does not take splits the graph: each border costs a copy at run time, seconds of
passes when lowering, and keeps alive what crosses it. What our graphs hold of that kind:

| operator | becomes |
|---|---|
| sum over one dimension, or all | product with a column or row of ones |
| layer norm and its gradient, gradients of softmax and sigmoid | their definitions |
| maximum of a row, to keep exp in range | mean of the row under its own softmax, see `_amax` |
| gradient of a slice | padding with zeros |
| squeeze, unsqueeze | view |
| what depends on no input (masks, ones) | a constant |
| expand before an operator that broadcasts | nothing |

Gathers from the embedding and the comparison with the position stay outside, before the delegate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

ATEN = torch.ops.aten
# make_fx takes NotImplemented for "leave this one as it is".
Rewritten: TypeAlias = Any
IDENTITIES = {ATEN.detach.default, ATEN.alias.default}
SHAPING = {ATEN.view.default, ATEN.expand.default}
BROADCASTING = {ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor}


def rewrite(graph_module: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """The same function of the same arguments; `graph_module` is left as it is."""
    with torch.no_grad():
        traced = make_fx(graph_module, decomposition_table=DECOMPOSITIONS)(*arguments)
    _drop_identities(traced)
    _fold_constants(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _row_sums(x: Tensor) -> Tensor:
    """(..., K) -> (..., 1)."""
    return (x.reshape(-1, x.shape[-1]) @ torch.ones(x.shape[-1], 1)).view(*x.shape[:-1], 1)


def _sum_dims(
    x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Rewritten:
    axes = [dim % x.dim() for dim in dims or range(x.dim())]
    if len(axes) == x.dim():
        total = x.reshape(1, -1) @ torch.ones(x.numel(), 1)
    elif axes == [x.dim() - 1]:
        total = _row_sums(x)
    elif axes == [0]:
        total = torch.ones(1, x.shape[0]) @ x.reshape(x.shape[0], -1)
    else:
        return NotImplemented
    kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return total.view(kept if keepdim else [s for a, s in enumerate(x.shape) if a not in axes])


def _sum_all(x: Tensor, dtype: torch.dtype | None = None) -> Rewritten:
    return _sum_dims(x, None)


def _amax(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Rewritten:
    """Not the maximum m, but something as good for log(sum(exp(x - c))) + c: c = sum(p x).

    With p = softmax(x), log(sum(exp(x))) - c is the entropy of p, so in [0, log K]: exp(x - c) is
    at most K and its sum at least 1. Our graphs take a maximum for nothing else.
    """
    if len(dims) != 1 or dims[0] % x.dim() != x.dim() - 1 or not keepdim:
        return NotImplemented
    return _row_sums(torch.softmax(x, -1) * x)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1]
    mean = _row_sums(x) * (1.0 / width)
    centred = x - mean
    reciprocal = torch.rsqrt(_row_sums(centred * centred) * (1.0 / width) + epsilon)
    return centred * reciprocal * weight + bias, mean, reciprocal


def _layer_norm_gradient(
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
    inner = g - _row_sums(g) * share - normal * (_row_sums(g * normal) * share)
    return inner * reciprocal, None, None


def _softmax_gradient(gradient: Tensor, p: Tensor, dim: int, dtype: torch.dtype) -> Rewritten:
    if dim % p.dim() != p.dim() - 1:
        return NotImplemented
    weighted = gradient * p
    return weighted - p * _row_sums(weighted)


def _sigmoid_gradient(gradient: Tensor, y: Tensor) -> Tensor:
    return gradient * (y - y * y)


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


def _unsqueeze(x: Tensor, dim: int) -> Tensor:
    dim %= x.dim() + 1
    return x.reshape(*x.shape[:dim], 1, *x.shape[dim:])


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    ATEN.sum.default: _sum_all,
    ATEN.sum.dim_IntList: _sum_dims,
    ATEN.amax.default: _amax,
    ATEN.native_layer_norm.default: _layer_norm,
    ATEN.native_layer_norm_backward.default: _layer_norm_gradient,
    ATEN._softmax_backward_data.default: _softmax_gradient,
    ATEN.sigmoid_backward.default: _sigmoid_gradient,
    ATEN.slice_backward.default: _slice_gradient,
    ATEN.squeeze.dim: _squeeze,
    ATEN.unsqueeze.default: _unsqueeze,
}


def _drop_identities(graph_module: fx.GraphModule) -> None:
    """Removes nodes that change nothing, or nothing that their users would notice."""
    for node in list(graph_module.graph.nodes):
        if node.target == ATEN._unsafe_view.default:
            node.target = ATEN.view.default
        elif node.target == ATEN.cat.default and len(node.args[0]) == 1:
            node.replace_all_uses_with(node.args[0][0])
            graph_module.graph.erase_node(node)
        elif (
            node.target in IDENTITIES
            or (node.target in SHAPING and _same_shape(node.args[0], node))
            or (node.target == ATEN.expand.default and all(map(_broadcasts(node), node.users)))
        ):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta["val"].shape == other.meta["val"].shape)


def _broadcasts(expanded: fx.Node) -> Callable[[fx.Node], bool]:
    """Whether a user of `expanded` gives the same without the expansion."""

    def check(user: fx.Node) -> bool:
        others = [a for a in user.args if isinstance(a, fx.Node) and a is not expanded]
        return user.target in BROADCASTING and any(_same_shape(user, other) for other in others)

    return check


def _fold_constants(graph_module: fx.GraphModule) -> None:
    """Computes what depends on no argument and no weight once, here."""
    values: dict[fx.Node, Tensor] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        inputs = node.all_input_nodes
        of_a_shape = node.target in (ATEN.ones_like.default, ATEN.zeros_like.default)
        if not of_a_shape and any(i not in values for i in inputs):
            continue
        if of_a_shape:
            shape = node.meta["val"]
            fill = torch.ones if node.target == ATEN.ones_like.default else torch.zeros
            values[node] = fill(shape.shape, dtype=shape.dtype)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    named: dict[tuple[Any, ...], str] = {}
    for node, value in values.items():
        # Tensors of the same content are one: there are many columns of ones.
        key = (value.dtype, value.shape, value.numpy().tobytes())
        if key not in named:
            named[key] = f"_constant_{len(named)}"
            graph_module.register_buffer(named[key], value.contiguous())
        with graph_module.graph.inserting_before(node):
            constant = graph_module.graph.get_attr(named[key])
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
    for node in reversed(values):
        graph_module.graph.erase_node(node)
