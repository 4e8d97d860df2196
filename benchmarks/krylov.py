"""Newton-Krylov beside SGN, Newton-CG, Adam and L-BFGS: steps and CPU time to the same training loss.

    python -m benchmarks.krylov --data-dir DIR [--task krylov-sine-10 …] [--seeds 3] [--fresh] [--runs-only]

Runs lie in benchmarks/results, as those of `benchmarks.suite`; the section takes its place in docs/results.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import krylov_report
from benchmarks.krylov_tasks import TASKS
from benchmarks.suite.runs import ROOT, run_task
from benchmarks.suite.store import Store
from benchmarks.timing import keep_freed_memory
from torchnewton.train.errors import UsageError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.krylov", description=__doc__.split("\n")[0])
    parser.add_argument("--task", action="append", choices=list(TASKS), help="again for each; default: all")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="the folder of the MNIST files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a smoke test, written to runs/quick-benchmarks")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--runs-only", action="store_true", help="leave the page, as when tasks run side by side")
    args = parser.parse_args()
    folder = ROOT / "runs/quick-benchmarks" if args.quick else ROOT
    store = Store(folder / "benchmarks/results")
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        for name in args.task or TASKS:
            if args.fresh:
                store.forget(name)
            task = TASKS[name].quick() if args.quick else TASKS[name]
            run_task(task, args.seeds, args.data_dir, store)
    except UsageError as error:
        sys.exit(f"Error: {error}")
    if args.runs_only:
        return
    tasks = [task.quick() if args.quick else task for task in TASKS.values()]
    text = krylov_report.section(store, args.seeds, tasks)
    print(f"Written: {krylov_report.write(folder / 'docs/results.md', text)}")


if __name__ == "__main__":
    main()
