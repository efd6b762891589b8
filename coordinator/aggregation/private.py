"""A mean with differential privacy on the device level, noised by the coordinator."""

from __future__ import annotations

import numpy as np

from coordinator.aggregation.updates import Flat, Update
from edge_runtime.noise import discrete_gaussian
from edge_runtime.quantization import Integers, grid_for, quantize_clipped


class PrivateMean:
    """x + (sum of clipped steps + noise) / n, with a fixed n (McMahan et al. 2018, arXiv
    1710.06963, the estimator with a fixed denominator).

    Steps are clipped to an L2 norm of S in whole numbers, so the sum changes by at most S when one
    device is there or not, exactly; the noise is the discrete Gaussian of standard deviation z S.
    Memory is that of a mean.
    """

    least_updates = 1

    def __init__(self, *, norm: float, noise_multiplier: float, devices: int) -> None:
        """
        Args:
            norm: S.
            noise_multiplier: z.
            devices: n, the most updates that a round may have. With fewer the step is shorter.
        """
        self._grid = grid_for(norm, devices, noise_multiplier)
        self._noise_multiplier = noise_multiplier
        self._devices = devices

    def configure_round(self, incoming: Flat) -> None:
        self._incoming = incoming
        self._sum: Integers = np.zeros(incoming.size, np.int64)
        self._accepted = 0

    def accept(self, update: Update) -> None:
        step = update.read(0, self._incoming.size)
        step -= self._incoming
        integers, _ = quantize_clipped(step, self._grid)
        self._sum += integers
        self._accepted += 1

    def aggregate(self) -> Flat:
        if self._accepted > self._devices:
            raise ValueError(f"{self._accepted} updates, and noise for {self._devices}")
        sigma = self._noise_multiplier * self._grid.levels
        noisy = self._sum + discrete_gaussian(sigma, self._sum.size)
        return self._incoming + noisy.astype(np.float64) * (self._grid.unit / self._devices)
