"""Several methods on one task, with equal time for each run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torchnewton.train.data import Dataset
from torchnewton.train.display import best_metric, metric, number
from torchnewton.train.errors import UsageError, choose
from torchnewton.train.loop import Budget, Record, train, train_step
from torchnewton.train.methods import METHODS, NAMES
from torchnewton.train.runs import Settings, describe, make_run


@dataclass(frozen=True)
class Result:
    """One run: its settings with every default filled in, how it ended and its curve."""

    settings: Settings
    status: str
    history: list[Record]

    @property
    def last(self) -> Record:
        """The final evaluation."""
        return self.history[-1]

    def score(self) -> float:
        """The final test metric, larger being better; a diverged run comes last."""
        if not self.last.is_finite():
            return -math.inf
        return -self.last.test_loss if self.last.test_accuracy is None else self.last.test_accuracy

    def best(self) -> float:
        """The best test metric on the way."""
        return best_metric(self.history, "mse" if self.last.test_accuracy is None else "accuracy")

    def seconds_to(self, target: float) -> float | None:
        """CPU seconds of training until the test metric first reaches `target`."""
        for r in self.history:
            if r.metric <= target if r.test_accuracy is None else r.metric >= target:
                return r.cpu_seconds
        return None


@dataclass(frozen=True)
class Entry:
    """One method: the runs of its best rate, one for each seed, and all the runs of the search."""

    method: str
    results: list[Result]
    search: list[Result]

    @property
    def lr(self) -> float | None:
        """The chosen rate."""
        return self.results[0].settings.lr

    @property
    def is_at_edge(self) -> bool:
        """Whether the chosen rate is the first or last of the grid, so that a wider one might do better."""
        return self.lr is not None and self.lr in (
            METHODS[self.method].rates[0],
            METHODS[self.method].rates[-1],
        )

    @property
    def all_results(self) -> list[Result]:
        """Every run once."""
        return [*self.search, *(r for r in self.results if r not in self.search)]

    @property
    def search_seconds(self) -> float:
        """CPU seconds spent on rates that were not chosen."""
        return sum(r.last.cpu_seconds for r in self.search if r not in self.results)


@dataclass(frozen=True)
class Comparison:
    """What was run and what came out."""

    settings: Settings
    seeds: int
    target: float | None
    command: str
    data: Dataset
    about: dict[str, str | int]
    entries: list[Entry]


def compare(
    settings: Settings,
    methods: Sequence[str],
    seeds: int,
    target: float | None,
    command: str,
    on_run: Callable[[str, float], None] = lambda label, fraction: None,
) -> Comparison:
    """Runs every method for `settings.seconds`; `on_run` is told each run and the fraction that is done.

    A first-order method runs once for each of its rates; the rate with the best final test metric then runs
    with the other seeds.

    Raises:
        UsageError: if a name is unknown, a setting does not fit, or `target` is out of range.
    """
    check(methods, seeds, target)
    full, run = make_run(replace(settings, method=methods[0], lr=None))
    data, about = run.data, describe(run)
    if target is not None and data.metric == "accuracy" and target > 1:
        raise UsageError(f"--target is {target:g}: an accuracy lies between 0 and 1.")
    total, done = sum(len(METHODS[m].rates or (None,)) + seeds - 1 for m in methods), 0

    def one(method: str, lr: float | None, seed: int) -> Result:
        nonlocal done
        rate = f", rate {lr:g}" if lr else ""
        on_run(f"{method}{rate}, seed {seed}", done / total)
        done += 1
        return run_once(replace(settings, method=method, lr=lr, seed=seed), data)

    entries = []
    for method in methods:
        search = [one(method, lr, settings.seed) for lr in METHODS[method].rates or (None,)]
        chosen = max(search, key=Result.score)
        others = [one(method, chosen.settings.lr, settings.seed + i) for i in range(1, seeds)]
        entries.append(Entry(method, [chosen, *others], search))
    on_run("done", 1.0)
    return Comparison(replace(settings, model=full.model), seeds, target, command, data, about, entries)


def check(methods: Sequence[str], seeds: int, target: float | None) -> None:
    """Raises `UsageError` for what can be seen to be wrong before anything runs."""
    for method in methods:
        choose("method", method, NAMES)
    if not methods or len(set(methods)) < len(methods):
        raise UsageError("--methods needs one or more methods, each once: newton,adam,sgd for example.")
    if seeds < 1:
        raise UsageError(f"--seeds is {seeds}: it has to be 1 or more.")
    if target is not None and not 0 < target < math.inf:
        raise UsageError(f"--target is {target}: it has to be a positive number.")


def run_once(settings: Settings, data: Dataset) -> Result:
    """One run within `settings.seconds`, after a step of a copy that pays what only first steps cost."""
    train_step(make_run(settings, data)[1])
    full, run = make_run(settings, data)
    status = train(run, Budget(seconds=settings.seconds))
    return Result(full, status, run.history)


HEADERS = ("method", "rate", "best test", "train loss", "target", "steps", "passes", "search")


def rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """The table of a comparison, one row a method, under `HEADERS`."""
    name = comparison.data.metric
    for entry in comparison.entries:
        results = entry.results
        rate = "–" if entry.lr is None else f"{entry.lr:g}{' edge' if entry.is_at_edge else ''}"
        yield (
            entry.method,
            rate,
            _spread([r.best() for r in results], name),
            number(statistics.fmean(r.last.train_loss for r in results)),
            _time_to(results, comparison.target),
            f"{statistics.fmean(r.last.step for r in results):,.0f}",
            f"{statistics.fmean(r.last.data_passes for r in results):,.1f}",
            f"{entry.search_seconds:.1f} s" if entry.search_seconds else "–",
        )


def _spread(values: list[float], name: str) -> str:
    """Mean ± standard deviation over the seeds."""
    mean = metric(statistics.fmean(values), name)
    if len(values) == 1:
        return mean
    deviation = statistics.stdev(values)
    return f"{mean} ± {metric(deviation, name) if name == 'accuracy' else number(deviation, 1)}"


def _time_to(results: list[Result], target: float | None) -> str:
    """Mean seconds to the target, or how many seeds reached it."""
    if target is None:
        return "–"
    times = [t for t in (r.seconds_to(target) for r in results) if t is not None]
    if len(times) < len(results):
        return f"{len(times)} of {len(results)}"
    return f"{statistics.fmean(times):.2f} s"
