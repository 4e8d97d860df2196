"""Performance profiles of Dolan and Moré: how often a method is within a factor of the best.

Method s needs t(p, s) for task p, infinite where it fails or was not run; r(p, s) = t(p, s) / min over s of t(p, s).
Its profile is ρ_s(τ) = |{p : r(p, s) ≤ τ}| / |{p}|, a share of ALL tasks given: those that nobody solves count, too.

Source: Dolan, Moré, "Benchmarking optimization software with performance profiles", arXiv cs/0102001, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Costs = Mapping[str, Mapping[str, float]]  # by task and method; what is missing is infinite


def ratios(costs: Costs) -> dict[str, list[float]]:
    """r(p, s) for every method s, over the tasks in their order."""
    methods = list(dict.fromkeys(method for row in costs.values() for method in row))
    found: dict[str, list[float]] = {method: [] for method in methods}
    for row in costs.values():
        best = min(row.values(), default=math.inf)
        for method in methods:
            cost = row.get(method, math.inf)
            found[method].append(cost / best if math.isfinite(cost) else math.inf)
    return found


def profile(values: list[float], tau: float) -> float:
    """ρ(τ) of a method with these ratios."""
    return sum(r <= tau for r in values) / len(values) if values else 0.0
