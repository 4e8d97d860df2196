"""What a task and a method on it are: targets, budgets in CPU seconds, batches and rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.suite.measure import Step
from benchmarks.suite.problems import Problem, Training

Start = Callable[[Training, int | None, float], Step]  # from a training, the batch and the main constant


@dataclass(frozen=True)
class Entry:
    """A method on a task.

    `start` gets the rate as its main constant; a method without `rates` gets a factor on its main constant, 1 but for
    the sensitivity. `batch` None is all samples. Where an entry does not `go_on`, its runs end with the common time;
    one with `seconds` of its own, as its authors ran it, has them whatever it reaches.
    """

    method: str
    label: str
    start: Start
    batch: int | None
    rates: tuple[float, ...] = ()
    goes_on: bool = True
    seconds: float | None = None


class Budget(NamedTuple):
    """A run goes on to `limit`, or from its target to 1.5 times that time and to `seconds` at least."""

    seconds: float
    limit: float


@dataclass(frozen=True)
class Task:
    """Data, network, targets, budgets and methods of one task.

    Without a `search_limit` of its own, a run of the search for a rate has the limit of the others.
    """

    name: str
    text: str
    metric: str
    targets: tuple[float, ...]  # from easy to strict
    seconds: float
    search_seconds: float
    limit: float
    problem: Callable[[Path], Problem]
    entries: tuple[Entry, ...]
    search_limit: float | None = None
    samples: int = 0  # for training
    published: str = ""  # what others report
    sensitivity: float = 0.0  # seconds of a run with a changed constant; 0 is no such runs

    @property
    def is_accuracy(self) -> bool:
        return self.metric == "test accuracy"

    def reaches(self, value: float | None, target: float) -> bool:
        if value is None:
            return False
        return value >= target if self.is_accuracy else value <= target

    def budget(self, entry: Entry) -> Budget:
        if entry.seconds is not None:
            return Budget(entry.seconds, entry.seconds)
        return Budget(self.seconds, self.limit if entry.goes_on else self.seconds)

    def search_budget(self, entry: Entry) -> Budget:
        limit = self.limit if self.search_limit is None else self.search_limit
        return Budget(self.search_seconds, limit if entry.goes_on else self.search_seconds)

    def quick(self) -> Task:
        """A smoke test: all methods at one rate, for a hundredth of the budget."""
        return replace(
            self,
            seconds=self.seconds / 100,
            search_seconds=self.search_seconds / 100,
            limit=self.limit / 100,
            search_limit=None if self.search_limit is None else self.search_limit / 100,
            sensitivity=self.sensitivity / 100,
            entries=tuple(
                replace(entry, rates=entry.rates[:1], seconds=entry.seconds and entry.seconds / 100)
                for entry in self.entries
            ),
        )
