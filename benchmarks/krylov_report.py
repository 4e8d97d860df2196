"""The section on Newton-Krylov in docs/results.md."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.krylov_tasks import TASKS
from benchmarks.suite.criteria import Verdict
from benchmarks.suite.rows import Row, collect
from benchmarks.suite.store import Store
from benchmarks.suite.tables import task_table, value_text
from benchmarks.suite.task import Task

TITLE = "## Newton-Krylov"
WORDS = {True: "holds", False: "does not hold", None: "not measured"}
HEAD = """{title}

`tn.NewtonKrylov` beside others, to the same training loss: steps and CPU time, written by

    python -m benchmarks.krylov --data-dir DIR --seeds {seeds}

Measured {dates} on {cpus} with torch {torch}, other programs running beside. The rules of measurement are those
above, but that a run looks at the training loss. All methods see the same batches but L-BFGS, which sees all
samples, and the first row of Adam, whose batch is its usual one; both rows of Adam choose one of five rates by a
search. *With the test of halves* ends the Krylov loop also where two halves of the batch do not agree on a
curvature (`disagreement=1.0`). *CG to its tolerance* ends it at 1e-3, 100 iterations, or pᵀHp ≤ 0, where CG cannot
go on, and shortens the step to the radius. A gradient is one of the method's own batch; a Hessian product counts as
two, the test of a direction as two thirds."""


def section(store: Store, seeds: int, tasks: Sequence[Task] = tuple(TASKS.values())) -> str:
    """The section; empty where nothing is measured."""
    rows = {task.name: _rows(task, seeds, store) for task in tasks}
    runs = [run for found in rows.values() for row in found.values() for run in row.runs]
    if not runs:
        return ""
    about = {name: sorted({run.about[name] for run in runs}) for name in runs[0].about}
    head = HEAD.format(
        title=TITLE,
        seeds=seeds,
        dates=" to ".join(dict.fromkeys([about["date"][0], about["date"][-1]])),
        cpus=" and ".join(about["cpu"]),
        torch=" and ".join(about["torch"]),
    )
    found = [steps_verdict(rows, "adam"), steps_verdict(rows, "adam-same-batch"), early_end_verdict(rows)]
    parts = [head, "\n".join(f"- **{WORDS[v.holds]}** – {v.sentence}" for v in found)]
    for task in tasks:
        if rows[task.name]:
            budget = f"Every run has {task.seconds:g} s, {task.limit:g} s where the loss is not reached by then."
            table = task_table(task, list(rows[task.name].values()))
            parts.append(f"### {task.name.removeprefix('krylov-')}\n\n{task.text} {budget}\n\n{table}")
    return "\n\n".join(parts)


def write(page: Path, text: str) -> Path:
    """Puts the section in the place of the old one, or at the end of the page."""
    old = page.read_text(encoding="utf-8") if page.is_file() else "# Results\n"
    kept = re.sub(rf"\n*^{TITLE}$.*?(?=^## |\Z)", "\n\n", old, flags=re.DOTALL | re.MULTILINE).rstrip()
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{kept}\n\n{text}\n" if text else f"{kept}\n", encoding="utf-8")
    return page


def _rows(task: Task, seeds: int, store: Store) -> dict[str, Row]:
    found = {entry.method: collect(task, entry, seeds, store.get) for entry in task.entries}
    return {method: row for method, row in found.items() if row}


def steps_verdict(rows: dict[str, dict[str, Row]], rival: str) -> Verdict:
    """At most a tenth of Adam's steps on two tasks of four."""
    parts, count = [], 0
    for found in rows.values():
        if not {"newton-krylov", rival} <= found.keys():
            return Verdict(None, "Runs of Newton-Krylov or Adam are missing.")
        mine, theirs = _steps(found["newton-krylov"]), _steps(found[rival])
        missed = math.isinf(theirs)
        if missed:  # then what it made in vain is a bound
            theirs = min(run.points[-1].step for run in found[rival].runs)
        count += 10 * mine <= theirs
        task = found["newton-krylov"].task
        more = "more than " if missed else ""
        own = "not reached" if math.isinf(mine) else f"{mine:,.0f}"
        goal = value_text(task, task.targets[-1])
        parts.append(f"{task.name.removeprefix('krylov-')} to {goal}: {own} and {more}{theirs:,.0f}")
    which = "its usual batch" if rival == "adam" else "the same batch"
    return Verdict(
        count >= 2,
        f"Steps of Newton-Krylov and of Adam with {which}, medians: {'; '.join(parts)}; asked: a tenth on two of four, "
        f"found on {count}.",
    )


def early_end_verdict(rows: dict[str, dict[str, Row]]) -> Verdict:
    """Less work than CG to its tolerance, to the same loss, and no loss of the best value."""
    parts, holds = [], True
    for name, found in rows.items():
        if not {"newton-krylov", "to-tolerance"} <= found.keys():
            return Verdict(None, "Runs of Newton-Krylov to its tolerance are missing.")
        mine, other = found["newton-krylov"], found["to-tolerance"]
        task = mine.task
        work = [_gradients(row) for row in (mine, other)]
        best = [row.mean_best() for row in (mine, other)]
        holds &= work[0] < work[1] and best[0] <= 1.02 * best[1]
        gradients = " and ".join("–" if math.isinf(w) else f"{w:,.0f}" for w in work)
        values = " and ".join(value_text(task, b, 2) for b in best)
        parts.append(f"{name.removeprefix('krylov-')}: {gradients} gradients, best value {values}")
    return Verdict(
        holds,
        "The early end of the Krylov loop, beside CG to its tolerance, medians of the work to the target and means of "
        f"the best value in the same time: {'; '.join(parts)}; asked: less work and no worse value on each.",
    )


def _steps(row: Row) -> float:
    work = row.median_work(row.task.targets[-1])
    return work[0] if work else math.inf


def _gradients(row: Row) -> float:
    work = row.median_work(row.task.targets[-1])
    return work[1] if work else math.inf
