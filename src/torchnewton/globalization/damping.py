"""How the damping λ of (A + λI)d = −g starts and adapts. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable


class Unit(Enum):
    """What the numbers of a rule are multiples of.

    ABSOLUTE: λ itself. CURVATURE: gᵀAg / gᵀg at the first step. NOISE: the noise of the gradient relative to the
    curvature, N‖∂f/∂z‖² / tr B, followed as it changes: see `torchnewton.curvature.noise_scale`. With the last two a
    factor on the loss changes nothing.
    """

    ABSOLUTE = "absolute"
    CURVATURE = "curvature"
    NOISE = "noise"


class Damping(Protocol):
    """A rule for λ.

    `damped_model` says whether the predicted reduction counts λ: −gᵀd − ½dᵀ(A + λI)d, or −gᵀd − ½dᵀAd. `full_step`
    says whether the reduction ratio is taken at the full step or at the length the line search has chosen. `unit` is
    what the numbers of the rule are multiples of. `search` are factors: λ times each of them is tried in every step
    beside λ itself, and the one whose full step reaches the lowest objective is taken.
    """

    @property
    def search(self) -> tuple[float, ...]:
        """The factors of λ that are tried beside λ."""
        ...

    @property
    def damped_model(self) -> bool:
        """Whether λ counts in the predicted reduction."""
        ...

    @property
    def full_step(self) -> bool:
        """Whether the ratio is that of the full step."""
        ...

    @property
    def unit(self) -> Unit:
        """What λ is a multiple of."""
        ...

    def start(self) -> float:
        """λ of the first step."""
        ...

    def update(self, damping: float, reduction_ratio: float, step_length: float, num_steps: int) -> float:
        """λ of the next step after `num_steps` steps, the last with this reduction ratio and step length."""
        ...

    def raised(self, damping: float) -> float:
        """λ after a step that was rejected."""
        ...


@runtime_checkable
class LearnsFromNewData(Protocol):
    """A damping rule that also asks how much the last step has helped on data it was not computed from."""

    def update_on_new_data(self, damping: float, reduction_ratio: float, step_length: float, new_ratio: float) -> float:
        """λ from that of the last step, its ratio on its own data, its length, and its ratio on the new data."""
        ...


@dataclass(frozen=True)
class LevenbergMarquardt:
    """λ ← `increase`·λ where ρ < `lower`, λ ← `decrease`·λ where ρ > `upper`, between `minimum` and `maximum`.

    λ starts at `initial`; ρ = actual / predicted reduction. `unit`, `damped_model` and `full_step` say what λ is a
    multiple of and which reductions these are: see `Damping`. The defaults of the factors are Martens' (2010) and
    simpleNN's.

    `search=(0.1, 10.0)` tries λ/10 and 10λ in every step, too, against the true objective, and goes on from the best.
    It needs a factorization (`Dual`, `Direct`, `Auto` where it takes one of them), which then serves every λ: for each
    one more Cholesky factorization and one more loss evaluation. With CG there is nothing to search.
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
    unit: Unit = Unit.ABSOLUTE
    search: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.decrease <= 1 <= self.increase:
            raise ValueError(
                f"LevenbergMarquardt: decrease={self.decrease} must be in (0, 1] and increase={self.increase} not "
                "less than 1."
            )
        if not 0 <= self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"LevenbergMarquardt: initial={self.initial} must be between minimum={self.minimum} and "
                f"maximum={self.maximum}."
            )
        if not all(factor > 0 for factor in self.search):
            raise ValueError(f"LevenbergMarquardt: search={self.search} must be positive factors of the damping.")
        if not 0 <= self.lower <= self.upper:
            raise ValueError(
                f"LevenbergMarquardt: lower={self.lower} must not be negative, nor greater than upper={self.upper}."
            )

    def start(self) -> float:
        """See `Damping.start`."""
        return self.initial

    def update(self, damping: float, reduction_ratio: float, step_length: float, num_steps: int) -> float:
        """See `Damping.update`."""
        if not reduction_ratio >= self.lower:
            return self.raised(damping)
        factor = self.decrease if reduction_ratio > self.upper else 1.0
        return max(damping * factor, self.minimum)

    def raised(self, damping: float) -> float:
        """See `Damping.raised`."""
        return min(max(damping * self.increase, 1e-12), self.maximum)


@dataclass(frozen=True)
class AutoDamping(LevenbergMarquardt):
    """Levenberg-Marquardt that finds its own scale and does not trust a step's own data alone: the default of `Newton`.

    λ is relative to the curvature along the first gradient, so that a factor on the loss changes nothing. When the
    next step comes with other data, the last step is judged on them, too: it should have reduced their loss. Where it
    has raised it (ρ_new < 0), the step has fitted its batch, not the task, and λ grows, up to `noise_limit`; where it
    has got half of the reduction predicted (ρ_new > ½), λ shrinks. On the same data, ρ alone decides. On a small
    noisy batch the exact solution with λ → 0 fits every sample of it and ruins the rest; this rule keeps it from that.
    A step that the line search had to shorten does not lower λ on its own data, one shortened to less than a quarter
    on none.

    Cost: one more loss evaluation a step where the data change.
    """

    initial: float = 1e-3
    increase: float = 2.0
    decrease: float = 1.0 / 3.0
    minimum: float = 1e-12
    unit: Unit = Unit.CURVATURE
    noise_limit: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_limit >= 0:
            raise ValueError(f"AutoDamping: noise_limit={self.noise_limit} must not be negative.")

    def update(self, damping: float, reduction_ratio: float, step_length: float, num_steps: int) -> float:
        """See `Damping.update`."""
        ratio = reduction_ratio if step_length == 1 else min(reduction_ratio, self.upper)
        return super().update(damping, ratio, step_length, num_steps)

    def update_on_new_data(self, damping: float, reduction_ratio: float, step_length: float, new_ratio: float) -> float:
        """See `LearnsFromNewData.update_on_new_data`."""
        if not reduction_ratio >= self.lower:
            return self.raised(damping)
        if not new_ratio >= 0:
            return max(damping, min(damping * self.increase, self.noise_limit))
        helped = new_ratio > 0.5 and step_length >= 0.25
        return max(damping * self.decrease, self.minimum) if helped else damping


@dataclass(frozen=True)
class ConstantDamping:
    """λ = `value` in every step; `unit`, `damped_model`, `full_step` and `search` as in `Damping`."""

    value: float
    damped_model: bool = False
    full_step: bool = False
    unit: Unit = Unit.ABSOLUTE
    search: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value >= 0):
            raise ValueError(f"ConstantDamping: value={self.value} must be a number that is not negative.")

    def start(self) -> float:
        """See `Damping.start`."""
        return self.value

    def update(self, damping: float, reduction_ratio: float, step_length: float, num_steps: int) -> float:
        """See `Damping.update`."""
        return self.value

    def raised(self, damping: float) -> float:
        """See `Damping.raised`."""
        return self.value


@dataclass(frozen=True)
class ScheduledDamping:
    """λ = `schedule`(number of steps made), whatever the ratio.

    `unit`, `damped_model`, `full_step` and `search` as in `Damping`.
    """

    schedule: Callable[[int], float]
    damped_model: bool = False
    full_step: bool = False
    unit: Unit = Unit.ABSOLUTE
    search: tuple[float, ...] = ()

    def start(self) -> float:
        """See `Damping.start`."""
        return self.schedule(0)

    def update(self, damping: float, reduction_ratio: float, step_length: float, num_steps: int) -> float:
        """See `Damping.update`."""
        return self.schedule(num_steps)

    def raised(self, damping: float) -> float:
        """See `Damping.raised`."""
        return damping
