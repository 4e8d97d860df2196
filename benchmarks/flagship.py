"""What the rules of the flagship are worth: steps to a target for `Newton` without arguments and for other choices.

    python -m benchmarks.flagship --data-dir DIR

Steps, not seconds: they do not depend on the machine's load. Written to benchmarks/results/studies/flagship.jsonl and
the table of docs/newton.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import torchnewton as tn
from benchmarks.study import Row, Rows, write_section
from benchmarks.suite.methods import with_closure
from benchmarks.suite.store import Point, Run
from benchmarks.suite.tables import table, value_text
from benchmarks.suite.task import Task
from benchmarks.suite.tasks import TASKS
from torchnewton.optim.regime import EXACT, PLANE, RegimeChoice

NAMES = ("sine-10", "kin8nm", "california", "letter", "satimage", "autoencoder")
SEEDS, STEPS = 3, 250
Make = Callable[[nn.Module], tn.Newton]


def plane(damping: tn.LevenbergMarquardt, solver: tn.Plane | None = None) -> Make:
    def make(model: nn.Module) -> tn.Newton:
        return tn.Newton(
            model.parameters(),
            curvature=PLANE.curvature,
            solver=solver or PLANE.solver,
            preconditioner=tn.KFAC(),
            damping=damping,
        )

    return make


def chosen(choice: RegimeChoice) -> Make:
    def make(model: nn.Module) -> tn.Newton:
        optimizer = tn.Newton(model.parameters())
        optimizer.choice = choice
        return optimizer

    return make


class OneDirection(tn.Plane):
    """Without the previous step."""

    @property
    def uses_previous_step(self) -> bool:
        return False

    def solve(self, A, b, x0=None, preconditioner=None):  # type: ignore[no-untyped-def]
        return super().solve(A, b, None, preconditioner)


NOISE = PLANE.damping
assert isinstance(NOISE, tn.LevenbergMarquardt)
VARIANTS: dict[str, Make] = {
    "`Newton(params)`": lambda model: tn.Newton(model.parameters()),
    "always exact": chosen(RegimeChoice(least_trust=-2.0, flops=1e12)),
    "always the plane": plane(NOISE),
    "plane without the last step": plane(NOISE, OneDirection()),
    "plane, least λ 1e-4 units of noise": plane(replace(NOISE, minimum=1e-4)),
    "plane, least λ 1e-2 units of noise": plane(replace(NOISE, minimum=1e-2)),
    "plane, λ from 0.1, at least 1e-3, absolute": plane(tn.LevenbergMarquardt(initial=0.1, minimum=1e-3)),
    "plane, λ from 1, at least 1e-3 first curvatures": plane(replace(NOISE, unit=tn.Unit.CURVATURE)),
    "plane, the rule of the exact regime": plane(EXACT.damping),  # type: ignore[arg-type]
}


def measure(task: Task, make: Make, seed: int, data_dir: Path) -> Row:
    """The first evaluation at the target, each step at first and then each fiftieth of the steps made; the best."""
    batch = next(entry.batch for entry in task.entries if entry.method == "newton")
    training = task.problem(data_dir).training(seed)
    step = with_closure(lambda model, _: make(model))(training, batch, 1.0)
    points, due = [], 1
    for number in range(1, STEPS + 1):
        try:
            step()
        except tn.RecordError as error:
            return {"steps": None, "best": None, "status": str(error)}
        if number >= due:
            points.append(Point(0.0, number, 0.0, training.test()))
            due = number + max(1, number // 50)
            if task.reaches(points[-1].value, task.targets[-1]):
                break
    run = Run(None, "", points, {})  # type: ignore[arg-type]
    first = run.first(task, task.targets[-1])
    return {"steps": first.step if first else None, "best": run.best(task)}


def cell(task: Task, rows: list[Row]) -> str:
    steps = sorted(row["steps"] or STEPS + 1 for row in rows)
    middle = statistics.median(steps)
    best = value_text(task, statistics.median(row["best"] for row in rows), 3)
    return f"{middle:.0f}" if middle <= STEPS else f"– ({best})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flagship", description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--task", action="append", choices=NAMES, help="only measure, this one; again for each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("flagship")
    found: dict[str, list[str]] = {variant: [] for variant in VARIANTS}
    for name in args.task or NAMES:
        task = TASKS[name]
        for variant, make in VARIANTS.items():
            if variant == "always exact" and name in ("autoencoder", "letter", "satimage"):
                found[variant].append("")  # a step takes seconds there
                continue
            runs = [
                rows.get(
                    {"task": name, "variant": variant, "seed": seed},
                    lambda t=task, m=make, s=seed: measure(t, m, s, args.data_dir),  # type: ignore[misc]
                )
                for seed in range(SEEDS)
            ]
            found[variant].append(cell(task, runs))
    if args.task:
        return
    lines = [[variant, *cells] for variant, cells in found.items()]
    targets = [f"{name}, {value_text(TASKS[name], TASKS[name].targets[-1])}" for name in NAMES]
    text = (
        f"Steps to the target on the tasks of [results.md](results.md), medians of {SEEDS} seeds; “–” is a target not "
        f"reached in {STEPS} steps, with the best value. Empty: a step would take seconds. {rows.machine()}\n\n"
        + table(["", *targets], lines)
        + "\n\nMade by `python -m benchmarks.flagship --data-dir DIR`."
    )
    write_section("newton.md", "flagship", text)


if __name__ == "__main__":
    main()
