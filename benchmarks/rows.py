"""A method's runs on a task: the search for a rate, then the seeds; and what a table says about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.store import Key, Run
from benchmarks.tasks import Entry, Task

Get = Callable[[Key], Run | None]  # measures a run, or only looks it up


@dataclass(frozen=True)
class Row:
    task: Task
    entry: Entry
    lr: float | None
    runs: list[Run]
    search: list[Run]

    @property
    def is_at_edge(self) -> bool:
        """Whether a wider grid of rates might do better."""
        return self.lr is not None and self.lr in (self.entry.rates[0], self.entry.rates[-1])

    @property
    def search_seconds(self) -> float:
        return sum(run.seconds for run in self.search)

    def seconds(self, target: float) -> list[float]:
        """CPU seconds to `target` for each seed, infinite where it was not reached."""
        points = [run.first(self.task, target) for run in self.runs]
        return [p.seconds if p else math.inf for p in points]

    def median_seconds(self, target: float) -> float:
        return statistics.median(self.seconds(target)) if self.runs else math.inf

    def bound(self, target: float) -> float:
        """The median, or the time that was not enough."""
        return min(self.median_seconds(target), *(run.seconds for run in self.runs))

    def median_work(self, target: float) -> tuple[float, float] | None:
        """Steps and gradients to `target`, medians over the seeds; None without a median time."""
        if math.isinf(self.median_seconds(target)):
            return None
        points = [p for run in self.runs if (p := run.first(self.task, target))]
        return statistics.median(p.step for p in points), statistics.median(p.gradients for p in points)

    def failures(self, target: float) -> int:
        return sum(math.isinf(t) for t in self.seconds(target))

    def mean_best(self) -> float:
        return statistics.fmean(run.best(self.task) for run in self.runs)


def collect(task: Task, entry: Entry, seeds: int, get: Get) -> Row | None:
    """All runs of a method that `get` gives; None without any."""
    found = (get(key_of(task, entry, lr, 0, task.search_seconds)) for lr in entry.rates)
    search = [run for run in found if run]
    if entry.rates and not search:
        return None
    lr = min(search, key=lambda run: _rank(task, run)).key.lr if entry.rates else None
    runs = [run for seed in range(seeds) if (run := get(key_of(task, entry, lr, seed, task.seconds)))]
    return Row(task, entry, lr, runs, search) if runs else None


def key_of(task: Task, entry: Entry, lr: float | None, seed: int, seconds: float) -> Key:
    limit = task.limit if entry.goes_on else seconds
    return Key(task.name, entry.method, lr, entry.batch, seed, seconds, limit)


def _rank(task: Task, run: Run) -> tuple[float, float, float]:
    """Small is good: targets missed, seconds to the strictest one reached, the best test value."""
    times = [p.seconds for target in task.targets if (p := run.first(task, target))]
    best = run.best(task)
    return len(task.targets) - len(times), times[-1] if times else 0.0, -best if task.is_accuracy else best
