"""Discrete Gaussian noise from the system's random bits.

The integers y with a probability proportional to exp(-y^2 / (2 sigma^2)). For differential privacy
it is as good as the continuous Gaussian (Canonne, Kamath, Steinke 2020, arXiv 2004.00010, theorem
4), and its numbers cannot say more than they should by how they were rounded.
"""

from __future__ import annotations

import math
import os

import numpy as np
from numpy.typing import NDArray

from edge_runtime.quantization import Integers

AT_ONCE = 2**18  # samples: what makes one takes many times its memory


def discrete_gaussian(sigma: float, size: int) -> Integers:
    """`size` independent samples, by algorithm 3 of the paper: a discrete Laplace of scale t is
    accepted with probability exp(-(|y| - sigma^2 / t)^2 / (2 sigma^2)).

    Uniform numbers have 53 bits, so that nothing beyond 36 t is drawn; a sample is there with a
    probability of less than 1e-100.
    """
    t = math.floor(sigma) + 1
    accepted = np.empty(size, np.int64)
    filled = 0
    while filled < size:
        wanted = min(size - filled, AT_ONCE)
        count = wanted + wanted // 2 + 16
        # In the reals P(floor(-t ln U) >= g) = exp(-g / t), which is the Laplace's magnitude.
        magnitude = np.floor(-t * np.log(_uniform(count)))
        bits = np.frombuffer(os.urandom(count), np.uint8)
        negative = (bits & 1).astype(bool)
        accept = _uniform(count) <= np.exp(-((magnitude - sigma**2 / t) ** 2) / (2 * sigma**2))
        accept &= ~(negative & (magnitude == 0))  # 0 has one sign
        values = np.where(negative, -magnitude, magnitude)[accept][:wanted]
        accepted[filled : filled + len(values)] = values.astype(np.int64)
        filled += len(values)
    return accepted


def _uniform(count: int) -> NDArray[np.float64]:
    """In (0, 1], multiples of 2^-53."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 1) * 2.0**-53
