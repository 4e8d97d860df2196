"""Trains with every method on every task, one thread a run, and writes docs/results.md with its pictures.

    python -m benchmarks.suite --data-dir DIR [--task sine-10 --task mnist-mlp --task digits --task poisson]
                               [--seeds 3] [--quick] [--fresh] [--report-only]

MNIST is read from DIR; the other tasks need no files. Finished runs lie in benchmarks/results, one JSON line
each, and are not repeated. Two processes may run two tasks side by side.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.problems import Problem
from benchmarks.rows import collect
from benchmarks.store import Key, Run, Store, about
from benchmarks.tasks import TASKS, Entry, Task
from torchnewton.train.errors import UsageError

ROOT = Path(__file__).parent.parent


def measure_key(problem: Problem, task: Task, entry: Entry, key: Key) -> Run:
    """The run of `key`, after a step of a copy that pays what only first steps cost."""

    def trial() -> measure.Trial:
        return problem.trial(lambda model: entry.make(model, key.lr or 1.0), key.batch, key.seed)

    measure.timed_step(trial())
    points, status = measure.run(trial(), key.seconds, key.limit, lambda value: task.reaches(value, task.targets[-1]))
    return Run(key, status, points, about())


def run_task(task: Task, seeds: int, data_dir: Path, store: Store) -> None:
    """Measures what the store does not have."""
    problem = task.problem(data_dir)
    for entry in task.entries:

        def get(key: Key, entry: Entry = entry) -> Run:
            run = store.get(key)
            if run is None:
                run = measure_key(problem, task, entry, key)
                store.add(run)
                rate = f", rate {key.lr:g}" if key.lr else ""
                print(
                    f"{time.strftime('%H:%M:%S')} {task.name}: {entry.method}{rate}, seed {key.seed}: "
                    f"{run.best(task):.6g} in {run.seconds:.1f} s, {run.status}",
                    flush=True,
                )
            return run

        collect(task, entry, seeds, get)


def main() -> None:
    from benchmarks import report  # which needs what the other benchmarks need

    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.split("\n")[0])
    parser.add_argument("--task", action="append", choices=list(TASKS), help="again for each; default: all")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="the folder of the MNIST files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a smoke test, written to runs/quick-benchmarks")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--report-only", action="store_true", help="only write the page and its pictures")
    args = parser.parse_args()
    folder = ROOT / "runs/quick-benchmarks" if args.quick else ROOT
    store = Store(folder / "benchmarks/results")
    tasks = {name: task.quick() if args.quick else task for name, task in TASKS.items()}
    torch.set_num_threads(1)
    try:
        for name in [] if args.report_only else args.task or tasks:
            if args.fresh:
                store.forget(name)
            run_task(tasks[name], args.seeds, args.data_dir, store)
    except UsageError as error:
        sys.exit(f"Error: {error}")
    page = report.write(list(tasks.values()), args.seeds, folder)
    print(f"Written: {page}")


if __name__ == "__main__":
    main()
