"""A method's runs on a task: the search for a rate, then the seeds; and what a table says about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.suite.measure import Point
from benchmarks.suite.store import Key, Run
from benchmarks.suite.task import Budget, Entry, Task

Get = Callable[[Key], Run | None]  # measures a run, or only looks it up


@dataclass(frozen=True)
class Row:
    task: Task
    entry: Entry
    lr: float | None
    runs: list[Run]
    search: list[Run] = field(default_factory=list)

    @property
    def is_at_edge(self) -> bool:
        """Whether a wider grid of rates might do better."""
        return self.lr is not None and self.lr in (self.entry.rates[0], self.entry.rates[-1])

    @property
    def search_seconds(self) -> float:
        return sum(run.seconds for run in self.search)

    @property
    def passes_per_gradient(self) -> float:
        """Passes over the data in a gradient of the method's own batch."""
        batch, samples = self.entry.batch, self.task.samples
        return 1.0 if batch is None or not samples else min(1.0, batch / samples)

    def seconds(self, target: float) -> list[float]:
        """CPU seconds to `target` for each seed, infinite where it was not reached."""
        return [p.seconds if p else math.inf for p in self._first(target)]

    def passes(self, target: float) -> list[float]:
        """Gradient-equivalents to `target` in passes over the data, for each seed."""
        return [p.gradients * self.passes_per_gradient if p else math.inf for p in self._first(target)]

    def median_seconds(self, target: float) -> float:
        return statistics.median(self.seconds(target)) if self.runs else math.inf

    def median_passes(self, target: float) -> float:
        return statistics.median(self.passes(target)) if self.runs else math.inf

    def bound(self, target: float) -> float:
        """The median, or the time that was not enough."""
        return min(self.median_seconds(target), *(run.seconds for run in self.runs))

    def passes_bound(self, target: float) -> float:
        """The median of the passes, or those that were not enough."""
        spent = [run.points[-1].gradients * self.passes_per_gradient for run in self.runs]
        return min(self.median_passes(target), *spent)

    def median_work(self, target: float) -> tuple[float, float] | None:
        """Steps and gradients to `target`, medians over the seeds; None without a median time."""
        if math.isinf(self.median_seconds(target)):
            return None
        points = [p for p in self._first(target) if p]
        return statistics.median(p.step for p in points), statistics.median(p.gradients for p in points)

    def failures(self, target: float) -> int:
        return sum(math.isinf(t) for t in self.seconds(target))

    def mean_best(self) -> float:
        return statistics.fmean(run.best(self.task) for run in self.runs)

    def mean_settled(self) -> float:
        return statistics.fmean(run.settled for run in self.runs)

    def _first(self, target: float) -> list[Point | None]:
        return [run.first(self.task, target) for run in self.runs]


def collect(task: Task, entry: Entry, seeds: int, get: Get) -> Row | None:
    """All runs of a method that `get` gives; None without any."""
    search = searched(task, entry, get)
    if entry.rates and not search:
        return None
    lr = best_rate(task, search)
    runs = [run for seed in range(seeds) if (run := get(key_of(task, entry, lr, seed, task.budget(entry))))]
    return Row(task, entry, lr, runs, search) if runs else None


def searched(task: Task, entry: Entry, get: Get) -> list[Run]:
    """The runs of the search for a rate, on the first seed."""
    budget = task.search_budget(entry)
    return [run for lr in entry.rates if (run := get(key_of(task, entry, lr, 0, budget)))]


def best_rate(task: Task, search: Sequence[Run]) -> float | None:
    """The rate that reaches the strictest target soonest, else the one with the best value."""
    return min(search, key=lambda run: _rank(task, run)).key.lr if search else None


def key_of(task: Task, entry: Entry, lr: float | None, seed: int, budget: Budget) -> Key:
    return Key(task.name, entry.method, lr, entry.batch, seed, budget.seconds, budget.limit)


def _rank(task: Task, run: Run) -> tuple[float, float, float]:
    """Small is good: targets missed, seconds to the strictest one reached, the best test value."""
    times = [p.seconds for target in task.targets if (p := run.first(task, target))]
    best = run.best(task)
    return len(task.targets) - len(times), times[-1] if times else 0.0, -best if task.is_accuracy else best
