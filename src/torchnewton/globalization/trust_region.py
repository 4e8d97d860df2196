"""A trust radius and a step length steered by the error of the Taylor expansion. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torchnewton.globalization.line_search import SearchResult


@dataclass(frozen=True)
class TrustRegion:
    """Line search and trust region in one: α and the radius follow the Taylor error e.

        m(α) = α gᵀd + ½α² dᵀHd,        e = |f(θ + αd) − f − m(α)| / |m(α)|

    The search begins at α = min(1, radius / ‖d‖). A length is taken with a sufficient decrease, f(θ + αd) ≤ f +
    `decrease`·(α gᵀd + ½α² min(dᵀHd, 0)), and with e ≤ `large` – or with more decrease than predicted, whatever e.
    Otherwise α shrinks by √(`small` / e), since the neglected term grows with α³ beside a slope with α, kept within
    0.1 and 0.5; the radius becomes the length tried, `max_trials` lengths at most. After a step with e ≤ `small` the
    radius is at least `growth` times its length. Where no length is taken, the radius becomes a quarter of the last.

    `radius` starts it; by default at a tenth of ‖θ‖, or 0.1 where ‖θ‖ < 1. An error below the rounding of f does not
    count, and where all that is promised is below it, the search ends and the radius stays.

    Source: Shen et al., arXiv 2009.07098, for steering by the Taylor error (abstract); the rule is derived here, the
    limits ¼ and ¾ are those of Levenberg-Marquardt rules, since e = |1 − ρ|.
    """

    radius: float | None = None
    decrease: float = 1e-4
    small: float = 0.25
    large: float = 0.75
    growth: float = 2.0
    max_trials: int = 12

    def __post_init__(self) -> None:
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise ValueError(f"TrustRegion: radius={self.radius} must be positive and finite, or None.")
        if not 0 < self.decrease < 1:
            raise ValueError(f"TrustRegion: decrease={self.decrease} must be between 0 and 1.")
        if not 0 < self.small <= self.large < 1:
            raise ValueError(f"TrustRegion: 0 < small={self.small} ≤ large={self.large} < 1 does not hold.")
        if not (self.growth >= 1 and self.max_trials >= 1):
            raise ValueError(f"TrustRegion: growth={self.growth} and max_trials={self.max_trials} must be at least 1.")

    def start(self, size: float) -> float:
        """The first radius, `size` being ‖θ‖."""
        return 0.1 * max(size, 1.0) if self.radius is None else self.radius

    def shrunk(self, radius: float) -> float:
        """The radius after a step that was rejected."""
        return radius / 4

    def search(
        self,
        evaluate: Callable[[float], float],
        start: float,
        slope: float,
        curved: float,
        length: float,
        radius: float,
        rounding: float = 0.0,
    ) -> tuple[SearchResult, float]:
        """The step length and the next radius.

        Along d with gᵀd = `slope` ≤ 0, dᵀHd = `curved` and ‖d‖ = `length`; `rounding` is that of f.
        """
        before, alpha, value = radius, min(1.0, radius / length), start
        for _ in range(self.max_trials):
            value = evaluate(alpha)
            model = alpha * slope + 0.5 * alpha**2 * curved
            error = max(abs(value - start - model) - rounding, 0.0) / abs(model) if model else math.inf
            required = self.decrease * (alpha * slope + 0.5 * alpha**2 * min(curved, 0.0))
            if math.isfinite(value) and value <= start + required:
                if error <= self.small:
                    return SearchResult(alpha, value, True), max(radius, self.growth * alpha * length)
                if error <= self.large or value - start < model:
                    return SearchResult(alpha, value, True), radius
            if abs(model) <= rounding:  # the place is as good as f can tell
                return SearchResult(alpha, value, False), before
            shrink = math.sqrt(self.small / error) if 0 < error < math.inf else 0.5
            tried, alpha = alpha, alpha * min(max(shrink, 0.1), 0.5)
            radius = alpha * length
        return SearchResult(tried, value, False), max(0.25 * tried * length, 1e-30)
