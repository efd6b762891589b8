"""Steps as integers, so that sums modulo 2^32 are exact.

A coordinate x with |x| <= bound becomes q = round(x / bound * levels). `levels` is chosen so that
the sum over all devices, noise included, stays below 2^31 in magnitude: read as a signed number, a
sum modulo 2^32 is then the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Residues = NDArray[np.uint32]
"""Integers modulo 2^32."""

# How many standard deviations of noise the sum has room for: a Gaussian is beyond them with a
# probability of 4e-33 per coordinate.
TAIL = 12.0


@dataclass(frozen=True)
class Grid:
    """Which number an integer stands for."""

    bound: float
    """Largest magnitude of a coordinate."""
    levels: int
    """The integer that it becomes."""

    @property
    def unit(self) -> float:
        """What 1 stands for."""
        return self.bound / self.levels


def grid_for(bound: float, devices: int, noise: float = 0.0) -> Grid:
    """The finest grid on which the sum over `devices` cannot wrap.

    Args:
        noise: standard deviation of what is added to the sum, as a multiple of `bound`.

    Raises:
        ValueError: there are too many devices for any.
    """
    levels = math.floor((2**31 - 1) / (devices + TAIL * noise))
    if levels < 1:
        raise ValueError(f"{devices} devices are too many to sum in 32 bits")
    return Grid(bound, levels)


def quantize(step: NDArray[np.floating], grid: Grid) -> tuple[Integers, int]:
    """`step` (D,) on the grid, and how many of its coordinates were beyond the bound.

    Raises:
        ValueError: a coordinate is no finite number.
    """
    _require_finite(step)
    beyond = int(np.count_nonzero(np.abs(step) > grid.bound))
    clipped = np.clip(step.astype(np.float64), -grid.bound, grid.bound)
    return np.rint(clipped / grid.unit).astype(np.int64), beyond


def quantize_clipped(step: NDArray[np.floating], grid: Grid) -> tuple[Integers, bool]:
    """`step` (D,) clipped so that the L2 norm of the integers is at most `grid.levels`, exactly;
    and whether it was longer than the bound.

    Flat clipping to the bound (McMahan et al. 2018, arXiv 1710.06963). Rounding can lengthen a
    step by sqrt(D) / 2 units, so it is clipped by as much shorter.

    Raises:
        ValueError: the grid is too coarse for D coordinates, or one of them is no finite number.
    """
    _require_finite(step)
    longest = grid.bound - math.sqrt(step.size) / 2 * grid.unit
    if longest <= 0:
        raise ValueError(
            f"{grid.levels} levels are too few for {step.size} coordinates; fewer devices per "
            "round leave room for more"
        )
    exact = step.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    factor = 1.0 if norm <= longest else longest / norm
    while True:
        integers = np.rint(exact * (factor / grid.unit)).astype(np.int64)
        if squared_norm(integers) <= grid.levels**2:
            return integers, norm > grid.bound
        factor *= 1 - 1e-9


def _require_finite(step: NDArray[np.floating]) -> None:
    if not np.isfinite(step).all():
        raise ValueError("a step with a NaN or an infinity cannot be summed")


def squared_norm(integers: Integers) -> int:
    """Exact, of integers below 2^31 in magnitude and of a norm below 2^31.5."""
    return int(np.dot(integers, integers))


def residues(integers: Integers) -> Residues:
    """The integers modulo 2^32."""
    return (integers & 0xFFFFFFFF).astype(np.uint32)


def signed(sums: Residues) -> Integers:
    """The integers, from -2^31 to 2^31 - 1, that are these modulo 2^32."""
    return sums.view(np.int32).astype(np.int64)
