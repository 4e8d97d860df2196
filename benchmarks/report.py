"""Writes docs/results.md and its pictures from the stored runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, krylov_report, product_tables
from benchmarks.criteria import Verdict, verdicts
from benchmarks.product_criteria import product_verdicts
from benchmarks.rows import Row, collect
from benchmarks.store import Store
from benchmarks.tables import task_table
from benchmarks.tasks import Task

WORDS = {True: "holds", False: "does not hold", None: "not measured"}

HEAD = """# Results

<!-- Written by `python -m benchmarks.suite`: do not edit. -->

All numbers on this page are measured and written by two commands. Rows in which torchnewton loses stay in.

    make bench-products DATA=DIR
    python -m benchmarks.suite --data-dir DIR --seeds {seeds}

{machine}

- One thread a run. Seconds of training runs are CPU seconds of training alone: drawing the batch is included,
  evaluation is not. One step of every method is made before on a copy, untimed. The test set is evaluated each time the
  time has grown by 3 %, but never inside a step, and one step of L-BFGS is up to 20 iterations.
- *Newton* is `tn.Newton(model.parameters())`, nothing else. *SGN* has its published constants. *L-BFGS* is
  `torch.optim.LBFGS` with `line_search_fn="strong_wolfe"`; unless its name says "mini-batches", every step
  sees all samples.
- SGD and Adam choose one of five rates by a search on the first seed: the rate that reaches the strictest
  target soonest, else the one with the best test value. The search is not part of their times: the last
  column is what it cost. A star marks a rate at the edge of its grid.
- Times, steps and gradients are medians over the seeds, in brackets each seed; "–" is a target not reached.
  *Gradients* is the work up to there in gradients of the method's own batch: `report.gradient_equivalents`
  for Newton and SGN, calls of the closure for the others.
- The best value is the mean over the seeds of the best on the way, chosen by the test set, for every method
  alike."""


def write(tasks: Sequence[Task], seeds: int, folder: Path) -> Path:
    """Writes the page below `folder` and returns its path."""
    store = Store(folder / "benchmarks/results")
    rows = {task.name: _rows(task, seeds, store) for task in tasks}
    results = folder / "benchmarks/results"
    products = {**_json(results / "products.json"), **preconditioners(folder)}
    by_name = {(name, row.entry.method): row for name, found in rows.items() for row in found}
    times = {row["network"]: row["seconds"] for row in products.get("products", [])}
    costs = {name: seconds["kept"] / seconds["gradient"] for name, seconds in times.items()}
    found = [*verdicts(by_name, costs), *product_verdicts(products)]
    sections = [
        HEAD.format(machine=_machine(by_name.values(), products), seeds=seeds),
        "## What is asked\n\n" + "\n".join(line(v) for v in found),
        *(_section(task, rows[task.name], folder / "docs") for task in tasks if rows[task.name]),
    ]
    sections += product_tables.sections(products)
    page = folder / "docs/results.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return krylov_report.write(page, krylov_report.section(store, seeds))


def _rows(task: Task, seeds: int, store: Store) -> list[Row]:
    return [row for entry in task.entries if (row := collect(task, entry, seeds, store.get))]


def _machine(rows: Iterable[Row], products: dict[str, Any]) -> str:
    """The machines, versions and dates of the runs shown."""
    abouts = [run.about for row in rows for run in row.runs] + ([products["about"]] if "about" in products else [])
    seen = {name: sorted({about[name] for about in abouts}) for about in abouts[:1] for name in about}
    if not seen:
        return "Nothing is measured yet."
    dates = " to ".join(dict.fromkeys([seen["date"][0], seen["date"][-1]]))
    versions = ", ".join(f"{name} {' and '.join(seen[name])}" for name in ("torchnewton", "torch", "python"))
    return f"Measured {dates} on {' and '.join(seen['cpu'])}; {versions}."


def line(verdict: Verdict) -> str:
    """A criterion with what came out."""
    return f"- **{WORDS[verdict.holds]}** – {verdict.sentence}"


def _section(task: Task, rows: list[Row], docs: Path) -> str:
    path = docs / "figures" / f"{task.name}.svg"
    figures.draw(task, rows, path)
    picture = f"![{figures.alternative_text(task, rows)}]({path.relative_to(docs)})"
    parts = [f"## {task.name}", task.text, _budget(task), picture, task_table(task, rows), *_endings(rows)]
    return "\n\n".join(parts)


def _budget(task: Task) -> str:
    text = f"Every run has {task.seconds:g} s, a run of the rate search {task.search_seconds:g} s. "
    labels = [entry.label.split(",")[0] for entry in task.entries if entry.goes_on]
    if task.limit > task.seconds:
        names = f"{', '.join(labels[:-1])} or {labels[-1]}"
        text += f"Where {names} has not reached the strictest target by then, it goes on until it does, "
        text += f"at most to {task.limit:g} s. "
    return text + "In the picture, thin lines are seeds and thick lines their medians; dashed: the targets."


def _endings(rows: list[Row]) -> list[str]:
    """Runs that did not end as they should."""
    bad = [
        f"- {row.entry.label}{f', rate {run.key.lr:g}' if run.key.lr else ''}, seed {run.key.seed}, "
        f"after {run.seconds:.1f} s: {run.status}"
        for row in rows
        for run in {run.key: run for run in [*row.search, *row.runs]}.values()
        if run.status != "finished"
    ]
    return ["Runs that ended early:\n\n" + "\n".join(bad)] if bad else []


def preconditioners(folder: Path) -> dict[str, Any]:
    """The stored iterations of CG with preconditioners, where there are any."""
    cases = _json(folder / "benchmarks/results/preconditioners.json").get("cases")
    return {"preconditioners": cases} if cases else {}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
