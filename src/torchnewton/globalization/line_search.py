"""How far to go along a direction. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SearchResult:
    """The step length found, f there, and whether it may be taken."""

    step_length: float
    value: float
    accepted: bool


class LineSearch(Protocol):
    """Chooses a step length along a descent direction."""

    def search(self, evaluate: Callable[[float], float], start: float, slope: float, full: float) -> SearchResult:
        """Search from f(0) = `start` with derivative `slope` < 0, f(1) = `full` being known."""
        ...


@dataclass(frozen=True)
class Armijo:
    """α = 1, ½, ¼, … until f(α) ≤ f(0) + `decrease`·α·slope, at most `max_halvings` times.

    `contraction` is the ratio of one length to the one before. With `scale_slope=False` the required decrease does
    not shrink with α (method SGN). With `accept_last` the last length is taken where none has passed, provided f is
    finite there; otherwise the step is refused.
    """

    decrease: float = 1e-4
    contraction: float = 0.5
    max_halvings: int = 10
    scale_slope: bool = True
    accept_last: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decrease < 1:
            raise ValueError(f"Armijo: decrease={self.decrease} must be at least 0 and less than 1.")
        if not 0 < self.contraction < 1:
            raise ValueError(f"Armijo: contraction={self.contraction} must be between 0 and 1.")
        if self.max_halvings < 0:
            raise ValueError(f"Armijo: max_halvings={self.max_halvings} must not be negative.")

    def search(self, evaluate: Callable[[float], float], start: float, slope: float, full: float) -> SearchResult:
        """See `LineSearch.search`."""
        alpha, value, halvings = 1.0, full, 0
        while True:
            required = self.decrease * slope * (alpha if self.scale_slope else 1.0)
            if math.isfinite(value) and value <= start + required:
                return SearchResult(alpha, value, True)
            if halvings == self.max_halvings:
                return SearchResult(alpha, value, self.accept_last and math.isfinite(value))
            alpha *= self.contraction
            halvings += 1
            value = evaluate(alpha)


@dataclass(frozen=True)
class FullStep:
    """α = 1 wherever f is finite there."""

    def search(self, evaluate: Callable[[float], float], start: float, slope: float, full: float) -> SearchResult:
        """See `LineSearch.search`."""
        return SearchResult(1.0, full, math.isfinite(full))
