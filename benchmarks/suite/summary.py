"""Newton without arguments beside the best tuned first-order method, task by task; and how sensitive all are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.suite.methods import FIRST_ORDER
from benchmarks.suite.profiles import Costs
from benchmarks.suite.rivals import package
from benchmarks.suite.rows import Get, Row
from benchmarks.suite.sensitivity import Variation, variations
from benchmarks.suite.tables import number, table, value_text
from benchmarks.suite.task import Task

ALLOWED_LOSS = 3.0


@dataclass(frozen=True)
class Duel:
    """A cost of Newton and of a rival to the strictest target; `bounds` are what was spent where it was not reached."""

    newton: float
    rival: float
    newton_bound: float
    rival_bound: float
    name: str

    @property
    def ratio(self) -> float:
        """Above 1: Newton was so many times sooner. A bound where one side failed; NaN where both did."""
        if math.isinf(self.newton) and math.isinf(self.rival):
            return math.nan
        return self.rival_bound / self.newton_bound

    @property
    def is_won(self) -> bool:
        """A side that did not reach the target has lost, whatever it spent."""
        return self.newton < self.rival

    @property
    def is_lost(self) -> bool:
        return self.rival < self.newton

    @property
    def loss(self) -> float:
        """How many times longer Newton took where it lost; infinite where it did not arrive; else 0."""
        if not self.is_lost:
            return 0.0
        return self.newton / self.rival

    @property
    def text(self) -> str:
        if math.isnan(self.ratio):
            return "–"
        sign = "> " if math.isinf(self.rival) else "< " if math.isinf(self.newton) else ""
        return f"{sign}{self.ratio:.2f}"

    @property
    def winner(self) -> str:
        return "Newton" if self.is_won else self.name if self.is_lost else "–"


def by_seconds(rows: Sequence[Row]) -> Duel | None:
    """CPU time; the rate search is not counted."""
    return _duel(rows, lambda row, goal: (row.median_seconds(goal), row.bound(goal)))


def by_passes(rows: Sequence[Row]) -> Duel | None:
    """Gradient-equivalents, in passes over the data, so that batches of any size compare."""
    return _duel(rows, lambda row, goal: (row.median_passes(goal), row.passes_bound(goal)))


def _duel(rows: Sequence[Row], cost: Callable[[Row, float], tuple[float, float]]) -> Duel | None:
    newton = next((row for row in rows if row.entry.method == "newton"), None)
    others = [row for row in rows if row.entry.method in FIRST_ORDER]
    if newton is None or not others:
        return None
    goal = newton.task.targets[-1]
    rival = min(others, key=lambda row: (cost(row, goal)[0], cost(row, goal)[1]))
    rate = f", rate {rival.lr:g}" if rival.lr else ""
    (mine, my_bound), (theirs, their_bound) = cost(newton, goal), cost(rival, goal)
    return Duel(mine, theirs, my_bound, their_bound, f"{rival.entry.label.split(',')[0]}{rate}")


def summary_table(rows: dict[str, list[Row]]) -> str:
    """One line a task."""
    header = ["task", "target", "Newton, CPU s", "best tuned first order", "its CPU s", "ratio", "sooner"]
    header += ["Newton, passes", "first order, passes", "ratio", "fewer passes"]
    lines = []
    for name, found in rows.items():
        time, work = by_seconds(found), by_passes(found)
        if time is None or work is None:
            continue
        task = found[0].task
        cells = [f"[{name}](#{name})", value_text(task, task.targets[-1]), number(time.newton), time.name]
        cells += [number(time.rival), time.text, time.winner]
        cells += [number(work.newton), f"{number(work.rival)} ({work.name})", work.text, work.winner]
        lines.append(cells)
    return table(header, lines)


def costs(rows: dict[str, list[Row]], passes: bool) -> Costs:
    """What the performance profiles are made of: the median cost of each method to the strictest target.

    Without methods that have run on fewer than half of the tasks.
    """
    found: dict[str, dict[str, float]] = {}
    for name, of_task in rows.items():
        found[name] = {}
        for row in of_task:
            goal, method = row.task.targets[-1], profiled(row)
            cost = row.median_passes(goal) if passes else row.median_seconds(goal)
            found[name][method] = min(cost, found[name].get(method, math.inf))
    runs = Counter(method for of_task in found.values() for method in of_task)
    return {
        name: {method: cost for method, cost in of_task.items() if 2 * runs[method] >= len(found)}
        for name, of_task in found.items()
    }


def profiled(row: Row) -> str:
    """A method's name in the profiles: L-BFGS is one, with or without mini-batches, the better on each task."""
    return "lbfgs" if row.entry.method.startswith("lbfgs") else row.entry.method


def labels(rows: dict[str, list[Row]]) -> dict[str, str]:
    """What the profiles call the methods; constants of a task are left out."""
    return {
        profiled(row): row.entry.label if package(row.entry) else row.entry.label.split(",")[0]
        for of_task in rows.values()
        for row in of_task
    }


def sensitivity_table(rows: Sequence[Row], get: Get) -> str:
    """Best values where a constant is moved; empty where nothing was."""
    lines = []
    for row in rows:
        for variation in variations(row):
            values = variation.values(row.task, get)
            if values:
                lines.append(_sensitivity_cells(row.task, variation, values))
    return table(["method", "constant", "smaller", "as it is", "larger", "spread"], lines) if lines else ""


def _sensitivity_cells(task: Task, variation: Variation, values: Sequence[float]) -> list[str]:
    factor = f"{variation.constant} (×{variation.factors[0]:g}, ×{variation.factors[-1]:g})"
    return [variation.label, factor, *(value_text(task, v, 2) for v in values), spread_text(task, values)]


def spread_text(task: Task, values: Sequence[float]) -> str:
    """Points of accuracy, or by which factor the values differ."""
    low, high = min(values), max(values)
    return f"{100 * (high - low):.2f} points" if task.is_accuracy else f"×{high / low:.2f}" if low > 0 else "–"
