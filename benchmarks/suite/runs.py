"""What the command does: the runs of a task, and the tasks in processes of their own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.suite import rivals, sensitivity
from benchmarks.suite.measure import Step
from benchmarks.suite.measure import run as measured
from benchmarks.suite.problems import Problem, Training
from benchmarks.suite.rows import Get, Row, best_rate, key_of, searched
from benchmarks.suite.store import Key, Run, Store, about
from benchmarks.suite.task import Entry, Task
from benchmarks.suite.tasks import TASKS
from benchmarks.timing import keep_freed_memory
from torchnewton.train.errors import UsageError

ROOT = Path(__file__).parent.parent.parent


def measure_key(problem: Problem, task: Task, entry: Entry, key: Key, warm: set[str]) -> Run:
    """The run of `key`; a method that is not `warm` first makes a step of a copy, for what only first steps cost."""

    def start() -> tuple[Step, Callable[[], float]]:
        training = problem.training(key.seed)
        return _safe_start(entry, training, key), training.test

    if entry.method not in warm:
        with suppress(Exception):  # the run that counts meets it again
            start()[0]()
        warm.add(entry.method)
    points, status = measured(*start(), key.seconds, key.limit, lambda value: task.reaches(value, task.targets[-1]))
    return Run(key, status, points, about())


def _safe_start(entry: Entry, training: Training, key: Key) -> Step:
    """A method that cannot start fails in its first step, which is a result."""
    try:
        return entry.start(training, key.batch, 1.0 if key.lr is None else key.lr)
    except Exception as error:
        failure = error

        def step() -> float:
            raise failure

        return step


def run_task(task: Task, seeds: int, data_dir: Path, store: Store) -> None:
    """Measures what the store does not have."""
    problem = task.problem(data_dir)
    size = problem.training(0).size
    if task.samples and size != task.samples:
        raise UsageError(f"{task.name} has {task.samples} training samples, the files in {data_dir} give {size}.")
    found = [entry for entry in task.entries if not rivals.is_missing(entry)]
    warm: set[str] = set()

    def getter(entry: Entry) -> Get:
        def get(key: Key) -> Run:
            run = store.get(key)
            if run is None:
                run = measure_key(problem, task, entry, key, warm)
                store.add(run)
                _say(task, entry, run)
            return run

        return get

    rates = {entry.method: best_rate(task, searched(task, entry, getter(entry))) for entry in found}
    for seed in range(seeds):
        for entry in found:
            getter(entry)(key_of(task, entry, rates[entry.method], seed, task.budget(entry)))
    for entry in found:
        for variation in sensitivity.variations(Row(task, entry, rates[entry.method], [])):
            for varied, key in variation.runs:
                getter(varied)(key)


def _say(task: Task, entry: Entry, run: Run) -> None:
    constant = "" if run.key.lr is None else f", {run.key.lr:g}"
    print(
        f"{time.strftime('%H:%M:%S')} {task.name}: {entry.method}{constant}, seed {run.key.seed}: "
        f"{run.best(task):.6g} in {run.seconds:.1f} s, {run.status}",
        flush=True,
    )


def names_longest_first(tasks: Iterable[Task]) -> list[str]:
    """By the time that all runs take at most."""
    return [task.name for task in sorted(tasks, key=lambda task: -task.limit * len(task.entries))]


def run_all(names: list[str], processes: int, arguments: tuple[bool, int, Path, Path]) -> list[str]:
    """Each task in a process; one whose files are missing does not keep the others from running, and is returned."""
    failures: list[str] = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in [pool.submit(run_by_name, name, *arguments) for name in names]:
            error = future.exception()
            if isinstance(error, UsageError):
                failures.append(str(error))
            else:
                future.result()
    return failures


def run_by_name(name: str, quick: bool, seeds: int, data_dir: Path, results: Path) -> None:
    """What a process does; by name, because the tasks hold functions, which do not travel."""
    torch.set_num_threads(1)
    keep_freed_memory()
    run_task(TASKS[name].quick() if quick else TASKS[name], seeds, data_dir, Store(results))
