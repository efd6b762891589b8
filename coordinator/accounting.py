"""How much privacy the rounds have cost, and whether another one is within the budget.

Each aggregated round is a Gaussian mechanism: a sum to which each device adds a vector of norm S at
most, and noise of standard deviation z S. Rounds compose by Renyi differential privacy, by Google's
`dp-accounting`. Every device is taken to have been in every round: who is selected is not secret,
and not drawn as the theorems on amplification by sampling want, so nothing is deducted for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.state import State


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of the rounds of one cohort."""

    noise_multiplier: float
    """z: standard deviation of the noise on the sum, as a multiple of the clipping norm."""
    delta: float
    budget: float | None
    """Largest epsilon; None: it is only counted."""

    def __str__(self) -> str:
        within = "" if self.budget is None else f", epsilon up to {self.budget:g}"
        return f"noise {self.noise_multiplier:g}, delta {self.delta:g}{within}"


def epsilon(rounds: Mapping[float, int], delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after `rounds`: noise multiplier -> how
    many rounds had it. Neighbouring are fleets that differ by one device."""
    return _epsilon(tuple(sorted(rounds.items())), delta)


@functools.lru_cache(maxsize=1024)
def _epsilon(rounds: tuple[tuple[float, int], ...], delta: float) -> float:
    # Imported here: it brings scipy, which only this needs.
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    if not any(count for _, count in rounds):
        return 0.0
    accountant = RdpAccountant()
    for noise_multiplier, count in rounds:
        accountant.compose(GaussianDpEvent(noise_multiplier), count)
    return float(accountant.get_epsilon(delta))


class UnsoundError(Exception):
    """What a state holds would make the promise of privacy untrue; one line that says why."""


def check(state: State, privacy: Privacy | None) -> None:
    """
    Raises:
        UnsoundError: rounds with and rounds without noise would follow each other.
    """
    if privacy is None and state.privacy_spent():
        raise UnsoundError(
            f"{state.directory} has rounds with differential privacy, and one without would undo "
            "what they promised; give --dp-noise, or choose another --state"
        )
    if privacy is not None and state.told_without_noise():
        raise UnsoundError(
            f"{state.directory} has rounds without --dp-noise, whose updates no later noise hides; "
            "choose another --state"
        )


class Ledger:
    """What has been spent of a budget, by what is stored: a restart does not change it."""

    def __init__(self, state: State, privacy: Privacy) -> None:
        self.privacy = privacy
        self._state = state

    def spent(self) -> float:
        """Epsilon so far."""
        return epsilon(self._state.privacy_spent(), self.privacy.delta)

    def described(self) -> dict[str, float | None]:
        """For the operator."""
        privacy = self.privacy
        return {
            "epsilon": round(self.spent(), 4),
            "delta": privacy.delta,
            "budget": privacy.budget,
        }

    def allows_another(self) -> bool:
        return self.rounds_left(1) == 1

    def rounds_left(self, most: int) -> int:
        """How many more rounds, up to `most`, are within the budget."""
        budget = self.privacy.budget
        if budget is None:
            return most
        # Each round costs something, so bisection finds the last one.
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._after(middle) <= budget else (low, middle - 1)
        return low

    def _after(self, more: int) -> float:
        rounds = dict(self._state.privacy_spent())
        noise = self.privacy.noise_multiplier
        rounds[noise] = rounds.get(noise, 0) + more
        return epsilon(rounds, self.privacy.delta)
