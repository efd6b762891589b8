"""LoRA pairs of different ranks in one round.

A pair (A, B) of rank r stands for the product s B A with s = alpha / sqrt(r), and only products can
be compared between ranks. So a pair gets another rank with the scale taken into account: zero rows
of A and columns of B are added, or the last ones left out, and B is multiplied by the old scale and
divided by the new one. Strategies see all updates at the rank of the round's generalist, which is
the largest.

Zero-padding is a mean of such updates. Of the others, HetLoRA weighs them by how much they have
learnt, and FlexLoRA averages what they stand for.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.updates import Flat, Layout, Pair, Update
from edge_runtime.adapters import Vectors

# Weight of an update without a product: nothing beside others, and equal if nobody has one.
LEAST_WEIGHT = 1e-150


class Fitted:
    """An update of one layout, seen at the rank of another one on the same targets."""

    def __init__(self, update: Update, own: Layout, wanted: Layout) -> None:
        self._update, self._own, self._wanted = update, own, wanted

    @property
    def tokens(self) -> int:
        return self._update.tokens

    @property
    def decay(self) -> float:
        return self._update.decay

    def began(self, incoming: Flat, start: int, stop: int) -> Flat:
        got = Fitted(_Held(incoming), self._wanted, self._own)
        return Fitted(got, self._own, self._wanted).read(start, stop)

    def read(self, start: int, stop: int, out: Flat | None = None) -> Flat:
        numbers = np.empty(stop - start) if out is None else out
        numbers[:] = 0
        firsts, sizes = self._wanted.firsts, self._wanted.sizes
        reached = range(max(0, bisect_right(firsts, start) - 1), bisect_left(firsts, stop))
        for index in reached:
            first = firsts[index]
            begin, end = max(start, first), min(stop, first + sizes[index])
            piece = numbers[begin - start : max(begin, end) - start]
            piece[:] = self._tensor(index)[begin - first : max(begin, end) - first]
        return numbers

    def _tensor(self, index: int) -> Flat:
        """Tensor `index` of the wanted layout."""
        name = self._wanted.names[index]
        place = self._own.places[name]
        first = self._own.firsts[place]
        held = self._update.read(first, first + self._own.sizes[place])
        held = held.reshape(self._own.shapes[place])
        fitted = np.zeros(self._wanted.shapes[index])
        part = tuple(slice(min(both)) for both in zip(held.shape, fitted.shape, strict=True))
        fitted[part] = held[part]
        if name.endswith(Pair.B):
            fitted *= self._own.scale / self._wanted.scale
        return fitted.ravel()


class _Held:
    """A vector that is in memory, as an update."""

    tokens, decay = 1, 1.0

    def __init__(self, vector: Flat) -> None:
        self._vector = vector

    def began(self, incoming: Flat, start: int, stop: int) -> Flat:
        return incoming[start:stop]

    def read(self, start: int, stop: int, out: Flat | None = None) -> Flat:
        if out is None:
            return self._vector[start:stop].copy()
        out[:] = self._vector[start:stop]
        return out


def fit(vector: Flat, own: Layout, wanted: Layout) -> Flat:
    """A flat vector of `own` at the rank of `wanted`."""
    return Fitted(_Held(vector), own, wanted).read(0, wanted.size)


def fit_generalist(generalist: Vectors, own: Layout, wanted: Layout) -> Vectors:
    """What devices of another rank get: shared role -> float32 vector.

    Of FlexLoRA's generalist that is the best approximation of that rank (Eckart-Young), since its
    rows and columns are in the order of singular values.
    """
    return wanted.split(fit(own.flatten(generalist), own, wanted).astype(np.float32))


class HetLoRA:
    """Mean of each target's factors, weighted by ||s B A||_F (Cho et al. 2024, arXiv 2401.06432;
    without the pruning of ranks that their devices do).

    A stream: one update is in memory at a time.
    """

    least_updates = 1

    def __init__(self, layout: Layout) -> None:
        self._pairs, self._scale = layout.pairs(), layout.scale

    def configure_round(self, incoming: Flat) -> None:
        self._sum = np.zeros_like(incoming)
        self._totals = np.zeros(len(self._pairs))

    def accept(self, update: Update) -> None:
        vector = update.read(0, self._sum.size)
        for index, pair in enumerate(self._pairs):
            norm = self._scale * product_norm(*pair.of(vector))
            weight = max(norm, LEAST_WEIGHT)
            self._totals[index] += weight
            for part in (pair.a, pair.b):
                self._sum[part] += weight * vector[part]

    def aggregate(self) -> Flat:
        for pair, total in zip(self._pairs, self._totals, strict=True):
            for part in (pair.a, pair.b):
                self._sum[part] /= total
        return self._sum


class FlexLoRA:
    """Mean of the products s B A, cut to the generalist's rank by singular value decomposition
    (Bai et al. 2024, arXiv 2402.11505). Singular values go into B; the rows of A are orthonormal.
    Where the mean has fewer singular values than that, A keeps its incoming rows, so that they can
    still learn, and B is zero.

    Memory is that of one target, a few times outputs x inputs numbers, besides the generalist.
    Updates are read again for each target.
    """

    least_updates = 1

    def __init__(self, layout: Layout, *, by_tokens: bool = False) -> None:
        """Weights are 1 or, `by_tokens`, the tokens that a device trained on."""
        self._pairs, self._scale = layout.pairs(), layout.scale
        self._by_tokens = by_tokens

    def configure_round(self, incoming: Flat) -> None:
        self._incoming = incoming
        self._updates: list[Update] = []

    def accept(self, update: Update) -> None:
        self._updates.append(update)

    def aggregate(self) -> Flat:
        result = self._incoming.copy()
        for pair in self._pairs:
            u, sigma, v = self._mean_product(pair)
            a, b = pair.of(result)
            count = min(len(a), int(np.sum(sigma > _noise(sigma, pair))))
            a[:count] = v[:count]
            b[:, :count] = u[:, :count] * (sigma[:count] / self._scale)
            b[:, count:] = 0
        return result

    def _mean_product(self, pair: Pair) -> tuple[Flat, Flat, Flat]:
        """U, the singular values and V of the mean of s B A: (outputs, k), (k,), (k, inputs)."""
        total = sum(self._weight(update) for update in self._updates)
        product = None
        lefts: list[Flat] = []
        rights: list[Flat] = []
        for update in self._updates:
            a = update.read(pair.a.start, pair.a.stop).reshape(pair.rank, pair.inputs)
            b = update.read(pair.b.start, pair.b.stop).reshape(pair.outputs, pair.rank)
            lefts.append(b * (self._scale * self._weight(update) / total))
            rights.append(a)
            if len(lefts) * pair.rank >= min(pair.inputs, pair.outputs):
                if product is None:
                    product = np.zeros((pair.outputs, pair.inputs))
                product += np.hstack(lefts) @ np.vstack(rights)
                lefts, rights = [], []
        if product is None:
            return _decomposed(np.hstack(lefts), np.vstack(rights))
        if lefts:
            product += np.hstack(lefts) @ np.vstack(rights)
        u, sigma, v = np.linalg.svd(product, full_matrices=False)
        return u, sigma, v

    def _weight(self, update: Update) -> int:
        return update.tokens if self._by_tokens else 1


def ordered(layout: Layout, generalist: Vectors) -> Vectors:
    """The same products with factors as FlexLoRA has them."""
    strategy = FlexLoRA(layout)
    flat = layout.flatten(generalist)
    strategy.configure_round(flat)
    strategy.accept(_Held(flat))
    return layout.split(strategy.aggregate().astype(np.float32))


def product_norm(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """||B A||_F without the product: its square is the sum over (B^T B) * (A A^T)."""
    return math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))


def _decomposed(left: Flat, right: Flat) -> tuple[Flat, Flat, Flat]:
    """The singular value decomposition of left right, which is of low rank."""
    q, r = np.linalg.qr(left)
    p, t = np.linalg.qr(right.T)
    u, sigma, v = np.linalg.svd(r @ t.T)
    return q @ u, sigma, v @ p.T


def _noise(sigma: Flat, pair: Pair) -> float:
    """Singular values up to here are what rounding left."""
    return float(sigma[0] * max(pair.inputs, pair.outputs) * np.finfo(np.float64).eps)
