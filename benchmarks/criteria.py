"""What torchnewton promises, each criterion as a sentence with the measured number; computed, never typed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.rows import Row
from benchmarks.tables import value_text

Rows = dict[tuple[str, str], Row]  # by task and method


@dataclass(frozen=True)
class Verdict:
    holds: bool | None  # None where runs are missing
    sentence: str


def verdicts(rows: Rows, product_costs: dict[str, float]) -> list[Verdict]:
    """Every criterion; `product_costs` are gradients for a kept curvature product, by network."""
    checks: list[Callable[[], Verdict]] = [
        lambda: _sgn_sine(rows["sine-10", "sgn"]),
        lambda: _sgn_mnist(rows["mnist-mlp", "sgn"]),
        lambda: _newton_sine(rows["sine-10", "newton"], _rivals(rows, "sine-10")),
        lambda: _newton_poisson(rows["poisson", "newton"], rows["poisson", "lbfgs"], rows["poisson", "adam"]),
        lambda: _newton_digits(rows["digits", "newton"]),
        lambda: _products(product_costs),
    ]
    return [_checked(check) for check in checks]


def _checked(check: Callable[[], Verdict]) -> Verdict:
    try:
        return check()
    except KeyError as missing:
        return Verdict(None, f"Measurements are missing: {' '.join(missing.args[0])}.")


def _rivals(rows: Rows, task: str) -> list[Row]:
    """Everything that is not of this package: first order and L-BFGS."""
    _ = rows[task, "sgd"], rows[task, "adam"], rows[task, "lbfgs"]  # all of them have to be there
    return [row for (name, method), row in rows.items() if name == task and method not in ("newton", "sgn")]


def _seeds(row: Row) -> str:
    return f"mean of {len(row.runs)} seeds" if len(row.runs) > 1 else "one seed"


def _sgn_sine(row: Row) -> Verdict:
    best = row.mean_best()
    return Verdict(
        best <= 1.1e-4,
        f"SGN with the published constants reaches a test MSE of {best:.3g} on sine-10 ({_seeds(row)}, the "
        "best on the way); asked: at most 1.1e-4.",
    )


def _sgn_mnist(row: Row) -> Verdict:
    best = row.mean_best()
    return Verdict(
        best >= 0.94,
        f"SGN with the published constants reaches {100 * best:.2f} % on MNIST 784-20-20-20-10 "
        f"({_seeds(row)}, the best on the way); asked: at least 94.0 %.",
    )


def _newton_sine(newton: Row, rivals: list[Row]) -> Verdict:
    target = newton.task.targets[-1]
    goal = value_text(newton.task, target)
    mine = newton.median_seconds(target)
    rival = min(rivals, key=lambda row: row.bound(target))
    theirs, missed = rival.bound(target), math.isinf(rival.median_seconds(target))
    if math.isinf(mine):
        return Verdict(False, f"Newton without arguments did not reach {goal} on sine-10.")
    best = f"the best of SGD, Adam and L-BFGS ({rival.entry.label}) needs"
    if missed:
        best = "SGD, Adam and L-BFGS do not reach it in"
    return Verdict(
        5 * mine <= theirs,
        f"Newton without arguments reaches {goal} on sine-10 in {mine:.2f} s of CPU time; {best} "
        f"{theirs:.2f} s: {theirs / mine:.1f} times as long{' at least' if missed else ''}; asked: 5.",
    )


def _newton_poisson(newton: Row, *rivals: Row) -> Verdict:
    mine = newton.median_seconds(1e-3)
    theirs = [f"{row.entry.label} {_needs(row, 1e-2)} {row.bound(1e-2):.2f} s" for row in rivals]
    reached = "is not reached" if math.isinf(mine) else f"is reached after {mine:.2f} s of CPU time"
    return Verdict(
        mine < min(row.bound(1e-2) for row in rivals),
        f"A relative error of 1e-3 on the Poisson equation {reached} by Newton without arguments; "
        f"{' and '.join(theirs)}; asked: Newton sooner than both.",
    )


def _needs(row: Row, target: float) -> str:
    goal = value_text(row.task, target)
    return f"does not reach {goal} in" if math.isinf(row.median_seconds(target)) else f"needs for {goal}"


def _newton_digits(row: Row) -> Verdict:
    best, median = row.mean_best(), row.median_seconds(0.975)
    when = "not reached by most seeds" if math.isinf(median) else f"reached after {median:.2f} s of CPU time"
    return Verdict(
        median < 60,
        f"Newton without arguments reaches {100 * best:.2f} % on the digits ({_seeds(row)}); 97.5 % is "
        f"{when}; asked: 97.5 % in less than 60 s.",
    )


def _products(costs: dict[str, float]) -> Verdict:
    if not costs:
        raise KeyError(("curvature", "products"))
    each = "; ".join(f"{name}: {cost:.2f}" for name, cost in costs.items())
    sentence = f"A kept curvature product costs at most {max(costs.values()):.2f} gradients ({each}); asked: 1.6."
    return Verdict(max(costs.values()) <= 1.6, sentence)
