"""Our programs in the operators that XNNPACK runs, so that each is one delegate.

Whatever XNNPACK does not take splits the graph: each border costs a copy at run time, seconds of
passes when lowering, and keeps alive what crosses it. What our graphs hold of that kind, besides
what `flat_graph` writes out for every engine:

| operator | becomes |
|---|---|
| sum over one dimension, or all | product with a column or row of ones |
| layer norm | its definition |
| maximum of a row, to keep exp in range | mean of the row under its own softmax, see `_amax` |
| stack, or more than five joined | joined by fives |

Gathers from the embedding and the comparison with the position stay outside, before the delegate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.flat_graph import ATEN, Decompositions, Rewritten, decompositions

MOST_JOINED = 5


def _row_sums(x: Tensor) -> Tensor:
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
) -> Rewritten:
    width = x.shape[-1]
    mean = _row_sums(x) * (1.0 / width)
    centred = x - mean
    reciprocal = torch.rsqrt(_row_sums(centred * centred) * (1.0 / width) + epsilon)
    return centred * reciprocal * weight + bias, mean, reciprocal


def _stack(xs: Sequence[Tensor], dim: int = 0) -> Rewritten:
    dim %= xs[0].dim() + 1
    return torch.cat([x.reshape(*x.shape[:dim], 1, *x.shape[dim:]) for x in xs], dim)


def _cat(xs: Sequence[Tensor], dim: int = 0) -> Rewritten:
    if len(xs) <= MOST_JOINED:
        return NotImplemented
    return torch.cat([torch.cat(list(xs[:MOST_JOINED]), dim), *xs[MOST_JOINED:]], dim)


def _rsub(x: Tensor, other: float, alpha: float = 1) -> Rewritten:
    return NotImplemented if alpha != 1 else x.neg() + other


DECOMPOSITIONS: Decompositions = {
    **decompositions(_row_sums),
    ATEN.sum.default: _sum_all,
    ATEN.sum.dim_IntList: _sum_dims,
    ATEN.amax.default: _amax,
    ATEN.native_layer_norm.default: _layer_norm,
    ATEN.stack.default: _stack,
    ATEN.cat.default: _cat,
    ATEN.rsub.Scalar: _rsub,
}
