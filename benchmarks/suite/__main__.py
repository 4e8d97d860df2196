"""Trains with every method on every task, one thread a run, and writes docs/results.md with its pictures.

    python -m benchmarks.suite --data-dir DIR [--task sine-10 --task letter …] [--processes 2] [--seeds 3]
                               [--quick] [--fresh] [--report-only]

DIR holds the data sets, as benchmarks/suite/tasks reads them. Finished runs lie in benchmarks/results, one JSON line
each, and are not repeated. Seeds come in turn over all methods, so that a slow hour of the machine meets all alike.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.suite import report
from benchmarks.suite.runs import ROOT, names_longest_first, run_all
from benchmarks.suite.store import Store
from benchmarks.suite.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.split("\n")[0])
    parser.add_argument("--task", action="append", choices=list(TASKS), help="again for each; default: all")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="the folder of the data sets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="tasks side by side, the longest first")
    parser.add_argument("--quick", action="store_true", help="a smoke test, written to runs/quick-benchmarks")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--report-only", action="store_true", help="only write the page and its pictures")
    args = parser.parse_args()
    folder = ROOT / "runs/quick-benchmarks" if args.quick else ROOT
    results = folder / "benchmarks/results"
    seeds = 1 if args.quick else args.seeds
    tasks = [task.quick() if args.quick else task for task in TASKS.values()]
    chosen = [] if args.report_only else names_longest_first(t for t in tasks if not args.task or t.name in args.task)
    if args.fresh:
        for name in chosen:
            Store(results).forget(name)
    failures = run_all(chosen, args.processes, (args.quick, seeds, args.data_dir, results))
    print(f"Written: {report.write(tasks, seeds, folder)}")
    if failures:
        sys.exit("\n".join(f"Error: {failure}" for failure in failures))


if __name__ == "__main__":
    main()
