"""Writes docs/results.md and its pictures from the stored runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import krylov_report, product_tables
from benchmarks.product_criteria import product_verdicts
from benchmarks.suite import figures, rivals, sensitivity, summary
from benchmarks.suite.criteria import Verdict, verdicts
from benchmarks.suite.profiles import ratios
from benchmarks.suite.rows import Row, collect
from benchmarks.suite.store import Store
from benchmarks.suite.tables import table, task_table
from benchmarks.suite.task import Task

WORDS = {True: "holds", False: "does not hold", None: "not measured"}

HEAD = """# Results

<!-- Written by `python -m benchmarks.suite`: do not edit. -->

All numbers on this page are measured and written by two commands. Rows in which torchnewton loses stay in.

    make bench-products DATA=DIR
    python -m benchmarks.suite --data-dir DIR --seeds {seeds}

{machine}

- One thread a run. Seconds of training runs are CPU seconds of training alone: drawing the batch is included,
  evaluation is not. One step of every method is made before on a copy, untimed. The test set is evaluated each time
  the time has grown by 3 % and by what the last evaluation took, but never inside a step, and one step of L-BFGS is
  up to 20 iterations. glibc keeps what is freed, for all alike.
- *Newton* is `tn.Newton(model.parameters())`, nothing else, with the batch of `torchnewton train`. *SGN* has its
  published constants. *Newton-CG* has them, too: the gradient of all samples, the curvature of 5 %. *L-BFGS* is
  `torch.optim.LBFGS` with `line_search_fn="strong_wolfe"`; unless its name says "mini-batches", every step sees all
  samples. *Muon* is `torch.optim.Muon` for hidden weights, AdamW for the rest. torchzero and
  torch-levenberg-marquardt are used as their documentation says.
- SGD, Adam, AdamW and Muon choose one of five rates by a search on the first seed in a third of the time: the rate
  that reaches the strictest target soonest, else the one with the best test value. The search is not part of their
  times: the last column is what it cost. A star marks a rate at the edge of its grid.
- Times, steps and gradients are medians over the seeds, in brackets each seed; "–" is a target not reached.
  *Gradients* is the work up to there in gradients of the method's own batch: `report.gradient_equivalents` for
  methods of torchnewton, calls of the closure for torch's, the operations counted for the others. *Passes* is that
  work times the batch over the training samples, so that batches of any size compare.
- A run ends at the time limit, or half as long again after the strictest target was reached as it took. The best
  value is the mean over the seeds of the best on the way, chosen by the test set, for every method alike: a method
  that is soon there had less time for it."""

SUMMARY = """## Newton and the best tuned first-order method

To the strictest target of each task. A ratio above 1 says how many times sooner Newton was; < and > are bounds where
one side did not arrive within its time."""

PROFILES = """## Performance profiles

For each method the share of all tasks that it solves within a factor of the best method on that task (Dolan and Moré,
arXiv cs/0102001). A task without runs of a method, or on which it fails, counts as not solved; methods with runs on
fewer than half of the tasks are left out. L-BFGS is the better of all samples and mini-batches."""

DISTRIBUTED = """## Exact, diagonalized and with a quorum

Training losses after 20 steps on four ranks, written by

    python -m benchmarks.distributed --data-dir DIR

*Exact* is `NewtonCG`, *diagonalized* and *quorum* are `DistributedNewton`, the last with a quorum of a half after one
iteration; the first 4,000 samples, one hidden layer of 64, at most 30 iterations of CG. Four processes share two cores,
so a product waits 10 ms on every rank, 100 ms on the slow one: the seconds compare the modes with each other. The page
[on several processes](distributed.md) says what they mean."""

SENSITIVITY = """## Sensitivity

The best test value on one seed in the same time for all, with the main constant of each method ten times smaller and
larger: the rate around the one that its search chose, the initial λ, the first trial step length. On {cnn} also the
constants of Newton-CG and the rate of SGD by a factor of 4."""


def write(tasks: Sequence[Task], seeds: int, folder: Path) -> Path:
    """Writes the page below `folder` and returns its path."""
    store = Store(folder / "benchmarks/results")
    rows = {task.name: found for task in tasks if (found := _rows(task, seeds, store))}
    results = folder / "benchmarks/results"
    products = {**_json(results / "products.json"), **preconditioners(folder)}
    by_name = {(name, row.entry.method): row for name, found in rows.items() for row in found}
    times = {row["network"]: row["seconds"] for row in products.get("products", [])}
    costs = {name: seconds["kept"] / seconds["gradient"] for name, seconds in times.items()}
    found = [*verdicts(by_name, costs, store.get, len(tasks)), *product_verdicts(products)]
    sections = [
        HEAD.format(machine=_machine(by_name.values(), products), seeds=seeds),
        "## What is asked\n\n" + "\n".join(line(v) for v in found),
        *_overview(rows, store, folder / "docs"),
        *(_section(task, rows[task.name], folder / "docs") for task in tasks if task.name in rows),
    ]
    sections += product_tables.sections(products)
    sections += distributed(results / "distributed.json")
    page = folder / "docs/results.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return krylov_report.write(page, krylov_report.section(store, seeds))


def _overview(rows: dict[str, list[Row]], store: Store, docs: Path) -> list[str]:
    """What all tasks together say."""
    if not rows:
        return []
    labels = summary.labels(rows)
    panels = {
        "CPU time": ratios(summary.costs(rows, passes=False)),
        "passes over the data": ratios(summary.costs(rows, passes=True)),
    }
    figures.draw_profiles(panels, labels, docs / "figures/profiles.svg")
    first = ", ".join(f"{labels[m]} {values.count(1.0)}" for m, values in panels["CPU time"].items())
    text = f"Share of the {len(rows)} tasks solved within a factor of the best; soonest of all, by tasks: {first}"
    picture = f"![{text}](figures/profiles.svg)"
    parts = [f"{SUMMARY}\n\n{summary.summary_table(rows)}", f"{PROFILES}\n\n{picture}"]
    tables = {name: summary.sensitivity_table(found, store.get) for name, found in rows.items()}
    if any(tables.values()):
        text = "\n\n".join(f"### {name}, moved constants\n\n{found}" for name, found in tables.items() if found)
        parts.append(f"{SENSITIVITY.format(cnn=sensitivity.CNN)}\n\n{text}")
    return parts


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
    text = f"{task.text} Published: {task.published}." if task.published else task.text
    parts = [
        f"## {task.name}",
        text,
        _budget(task),
        picture,
        task_table(task, rows),
        *_missing(task, rows),
        *_endings(rows),
    ]
    return "\n\n".join(parts)


def _budget(task: Task) -> str:
    search = task.limit if task.search_limit is None else task.search_limit
    return (
        f"Every run has at most {task.limit:g} s, a run of the rate search {search:g} s; one that reaches the "
        f"strictest target has at least {task.seconds:g} s. In the picture, thin lines are seeds and thick lines their "
        "medians; dashed: the targets."
    )


def _missing(task: Task, rows: list[Row]) -> list[str]:
    """Methods without runs because their package is not there."""
    measured = {row.entry.method for row in rows}
    names = {rivals.package(e) for e in task.entries if e.method not in measured and rivals.is_missing(e)}
    return [f"Not installed: {', '.join(sorted(str(name) for name in names))}."] if names else []


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


def distributed(path: Path) -> list[str]:
    """The stored rows of `benchmarks.distributed`, where there are any."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not rows:
        return []
    header = ["task", "mode", "loss", "kB a step", "messages a step", "s a step"]
    header += ["s a step, one slow rank", "loss, one slow rank"]
    healthy, slow = ([row for row in rows if row["slow rank"] is kind] for kind in (False, True))
    body = [
        [
            a["task"],
            a["mode"],
            f"{a['loss']:.4f}",
            f"{a['bytes'] / 1e3:.0f}",
            f"{a['messages']:.0f}",
            f"{a['seconds']:.3f}",
            f"{b['seconds']:.3f}",
            f"{b['loss']:.4f}",
        ]
        for a, b in zip(healthy, slow, strict=True)
    ]
    return [f"{DISTRIBUTED}\n\n{table(header, body)}"]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
