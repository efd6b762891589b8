"""Server optimizers: the step that the devices propose, d, is a gradient to the coordinator.

Each is a pure function: `step` takes what it remembers of earlier rounds and gives the step to
take with what to remember. Symbols are those of Reddi et al. 2021 (arXiv 2003.00295), algorithm 2,
which corrects no bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from coordinator.aggregation.updates import Flat

Memory = dict[str, Flat]
"""Name of a moment -> its D numbers."""


class ServerOptimizer(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def rate(self) -> float:
        """Its learning rate."""

    def initial(self, size: int) -> Memory:
        """What it remembers before the first round."""

    def step(self, memory: Memory, delta: Flat) -> tuple[Flat, Memory]:
        """The step to take from the incoming generalist, and the memory for the next round."""


@dataclass(frozen=True)
class Momentum:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): m = beta1 m + d; x = x + rate m."""

    name = "momentum"
    rate: float = 1.0
    beta1: float = 0.9

    def initial(self, size: int) -> Memory:
        return {"m": np.zeros(size)}

    def step(self, memory: Memory, delta: Flat) -> tuple[Flat, Memory]:
        m = self.beta1 * memory["m"] + delta
        return self.rate * m, {"m": m}


@dataclass(frozen=True)
class _Adaptive(ABC):
    """m = beta1 m + (1 - beta1) d; x = x + rate m / (sqrt(v) + tau), with v from tau^2 on."""

    rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def initial(self, size: int) -> Memory:
        return {"m": np.zeros(size), "v": np.full(size, self.tau**2)}

    def step(self, memory: Memory, delta: Flat) -> tuple[Flat, Memory]:
        m = self.beta1 * memory["m"] + (1 - self.beta1) * delta
        v = self._second_moment(memory["v"], delta**2)
        return self.rate * m / (np.sqrt(v) + self.tau), {"m": m, "v": v}

    @abstractmethod
    def _second_moment(self, v: Flat, square: Flat) -> Flat:
        """The next v, from the last one and d^2."""


class Adam(_Adaptive):
    """FedAdam: v = beta2 v + (1 - beta2) d^2."""

    name = "adam"

    def _second_moment(self, v: Flat, square: Flat) -> Flat:
        return self.beta2 * v + (1 - self.beta2) * square


class Yogi(_Adaptive):
    """FedYogi: v = v - (1 - beta2) d^2 sign(v - d^2)."""

    name = "yogi"

    def _second_moment(self, v: Flat, square: Flat) -> Flat:
        return v - (1 - self.beta2) * square * np.sign(v - square)
