"""How the damping λ of (A + λI)d = −g starts and adapts. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Damping(Protocol):
    """A rule for λ.

    `damped_model` says whether the predicted reduction counts λ: −gᵀd − ½dᵀ(A + λI)d, or −gᵀd − ½dᵀAd. `full_step`
    says whether the reduction ratio is taken at the full step or at the length the line search has chosen.
    """

    @property
    def damped_model(self) -> bool:
        """Whether λ counts in the predicted reduction."""
        ...

    @property
    def full_step(self) -> bool:
        """Whether the ratio is that of the full step."""
        ...

    def start(self) -> float:
        """λ of the first step."""
        ...

    def update(self, damping: float, reduction_ratio: float, num_steps: int) -> float:
        """λ of the next step after `num_steps` steps, the last with this reduction ratio."""
        ...

    def raised(self, damping: float) -> float:
        """λ after a step that was rejected."""
        ...


@dataclass(frozen=True)
class LevenbergMarquardt:
    """λ ← `increase`·λ where ρ < `lower`, λ ← `decrease`·λ where ρ > `upper`, between `minimum` and `maximum`.

    ρ = actual / predicted reduction. The defaults of the factors are Martens' (2010) and simpleNN's.
    """

    initial: float = 1.0
    increase: float = 1.5
    decrease: float = 2.0 / 3.0
    lower: float = 0.25
    upper: float = 0.75
    minimum: float = 0.0
    maximum: float = 1e10
    damped_model: bool = False
    full_step: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.decrease <= 1 <= self.increase:
            raise ValueError(
                f"LevenbergMarquardt: decrease={self.decrease} must be in (0, 1] and increase={self.increase} at least 1."
            )
        if not 0 <= self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"LevenbergMarquardt: initial={self.initial} must be between minimum={self.minimum} and "
                f"maximum={self.maximum}."
            )

    def start(self) -> float:
        """See `Damping.start`."""
        return self.initial

    def update(self, damping: float, reduction_ratio: float, num_steps: int) -> float:
        """See `Damping.update`."""
        if not reduction_ratio >= self.lower:
            return self.raised(damping)
        factor = self.decrease if reduction_ratio > self.upper else 1.0
        return max(damping * factor, self.minimum)

    def raised(self, damping: float) -> float:
        """See `Damping.raised`."""
        return min(max(damping * self.increase, 1e-12), self.maximum)


@dataclass(frozen=True)
class ConstantDamping:
    """The same λ in every step."""

    value: float
    damped_model: bool = False
    full_step: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value >= 0):
            raise ValueError(f"ConstantDamping: value={self.value} must be a number that is not negative.")

    def start(self) -> float:
        """See `Damping.start`."""
        return self.value

    def update(self, damping: float, reduction_ratio: float, num_steps: int) -> float:
        """See `Damping.update`."""
        return self.value

    def raised(self, damping: float) -> float:
        """See `Damping.raised`."""
        return self.value


@dataclass(frozen=True)
class ScheduledDamping:
    """λ = `schedule`(number of steps made), whatever the ratio."""

    schedule: Callable[[int], float]
    damped_model: bool = False
    full_step: bool = False

    def start(self) -> float:
        """See `Damping.start`."""
        return self.schedule(0)

    def update(self, damping: float, reduction_ratio: float, num_steps: int) -> float:
        """See `Damping.update`."""
        return self.schedule(num_steps)

    def raised(self, damping: float) -> float:
        """See `Damping.raised`."""
        return damping
