"""How far the best value moves when a method's main constant is ten times smaller and larger, on one seed.

The constant is the rate for methods that have one, else the initial damping; for L-BFGS and torchzero the first trial
step length. On the set where Newton-CG's published setting is asked for, its constants move one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.suite.methods import newton_cg
from benchmarks.suite.rows import Get, Row, key_of
from benchmarks.suite.store import Key
from benchmarks.suite.task import Budget, Entry, Task

FACTORS = (0.1, 1.0, 10.0)
SMALL_FACTORS = (0.25, 1.0, 4.0)
STEP = "first step length"
CNN = "cnn-mnist"


@dataclass(frozen=True)
class Variation:
    """A method with one constant at several values: the factors on it, and the runs."""

    label: str
    constant: str
    factors: tuple[float, ...]
    runs: tuple[tuple[Entry, Key], ...]

    def values(self, task: Task, get: Get) -> list[float] | None:
        """The best value of each run; None without all of them."""
        found = [run.best(task) for _, key in self.runs if (run := get(key))]
        return found if len(found) == len(self.runs) else None


def variations(row: Row) -> list[Variation]:
    """What is moved for a method on a task."""
    if not row.task.sensitivity:
        return []
    found = [_main(row, FACTORS)]
    if row.task.name == CNN and row.entry.method == "sgd":
        found.append(_main(row, SMALL_FACTORS))
    if row.task.name == CNN and row.entry.method == "newton-cg":
        found += _newton_cg(row)
    return found


def _main(row: Row, factors: tuple[float, ...]) -> Variation:
    entry = row.entry
    is_step = entry.method.startswith(("lbfgs", "torchzero"))
    constant = "rate" if entry.rates else STEP if is_step else "initial λ"
    runs = ((entry, _key(row.task, entry, (row.lr or 1.0) * factor)) for factor in factors)
    return Variation(entry.label, constant, factors, tuple(runs))


def _newton_cg(row: Row) -> list[Variation]:
    """λ₀, the tolerance of CG and the size of the subset; as published in the middle."""
    task, seconds = row.task, row.entry.seconds
    weight_decay = 1 / (0.01 * task.samples)

    def moved(constant: str, **published: float) -> Variation:
        ((name, value),) = published.items()
        entries = [
            newton_cg(
                "" if f == 1 else f"{name}-{f * value:g}",
                weight_decay=weight_decay,
                seconds=seconds,
                **{name: f * value},
            )
            for f in SMALL_FACTORS
        ]
        runs = tuple((entry, _key(task, entry, 1.0)) for entry in entries)
        return Variation("Newton-CG", constant, SMALL_FACTORS, runs)

    return [moved("λ₀", damping=1.0), moved("CG tolerance", rtol=0.1), moved("subset", share=0.05)]


def _key(task: Task, entry: Entry, constant: float) -> Key:
    """The same time for all, whatever they reach."""
    seconds = entry.seconds or task.sensitivity
    return key_of(task, entry, float(f"{constant:.6g}"), 0, Budget(seconds, seconds))
