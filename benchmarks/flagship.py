"""What the rules of the flagship are worth: work to a target for `Newton` without arguments and for other choices.

    python -m benchmarks.flagship --data-dir DIR

Gradients' worth of work, not seconds: it does not depend on the machine's load. Written to
benchmarks/results/studies/flagship.jsonl and the table of docs/newton.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.study import Row, Rows, write_section
from benchmarks.suite.measure import Point
from benchmarks.suite.methods import closure_of
from benchmarks.suite.store import Key, Run
from benchmarks.suite.tables import table, value_text
from benchmarks.suite.task import Task
from benchmarks.suite.tasks import TASKS
from torchnewton.globalization import Damping
from torchnewton.optim.glide import Glide
from torchnewton.optim.regime import EXACT, PLANE, RegimeChoice
from torchnewton.solvers import Operator, SolveResult

NAMES = ("sine-10", "kin8nm", "california", "letter", "satimage")
SEEDS, WORK = 3, 800.0  # gradients of the method's own batch, dense linear algebra of exact steps apart
Make = Callable[[nn.Module], tn.Newton]


def plane(damping: Damping, solver: tn.Plane | None = None) -> Make:
    def make(model: nn.Module) -> tn.Newton:
        return tn.Newton(
            model.parameters(),
            curvature=PLANE.curvature,
            solver=solver or PLANE.solver,
            preconditioner=tn.KFAC(),
            damping=damping,
        )

    return make


def gliding(glide: Glide) -> Make:
    return chosen(RegimeChoice(glide=glide))


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

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        return super().solve(A, b, None, preconditioner)


NOISE = PLANE.damping
assert isinstance(NOISE, tn.LevenbergMarquardt)
VARIANTS: dict[str, Make] = {
    "`Newton(params)`": lambda model: tn.Newton(model.parameters()),
    "no exact steps": chosen(RegimeChoice(gradients=0.0, flops=0.0)),
    "exact from the second step": chosen(RegimeChoice(first_trial=1, doubt=1e9, flops=1e12)),
    "never gliding": chosen(RegimeChoice(glide=None)),
    "gliding at the fitted length": gliding(Glide(least=1.0)),
    "gliding at lengths that only shrink": gliding(Glide(growth=1.0)),
    "gliding at the length the slopes call best": gliding(Glide(balance=0.0, least=0.01)),
    "gliding, never taken back": gliding(Glide(tolerance=1e9)),
    "gliding with μ up to 0.9": gliding(Glide(most=0.9)),
    "gliding from the sixth step on": gliding(Glide(first=5)),
    "full steps rarer more slowly: ten for each gap": gliding(Glide(first=10, patience=10)),
    "always the plane, never gliding": plane(NOISE),
    "plane without the last step": plane(NOISE, OneDirection()),
    "plane, least λ 1e-4 units of noise": plane(replace(NOISE, minimum=1e-4)),
    "plane, least λ 1e-2 units of noise": plane(replace(NOISE, minimum=1e-2)),
    "plane, λ from 0.1, at least 1e-3, absolute": plane(tn.LevenbergMarquardt(initial=0.1, minimum=1e-3)),
    "plane, λ from 1, at least 1e-3 first curvatures": plane(replace(NOISE, unit=tn.Unit.CURVATURE)),
    "plane, the rule of the exact regime": plane(EXACT.damping),
}


def measure(task: Task, make: Make, seed: int, data_dir: Path) -> Row:
    """The work to the first evaluation at the target, of evaluations 2 % of the work apart, and the best value."""
    batch = next(entry.batch for entry in task.entries if entry.method == "newton")
    training = task.problem(data_dir).training(seed)
    optimizer, batches = make(training.model), training.batches(batch)
    points: list[Point] = []
    work, due = 0.0, 0.0
    while work < WORK:
        try:
            optimizer.step(closure_of(optimizer, training, next(batches)))
        except tn.RecordError as error:
            return {"work": None, "best": None, "status": str(error)}
        report = optimizer.report
        work += 1 + report.loss_evaluations / 3 + report.products * 2 / 3
        if work >= due:
            points.append(Point(0.0, len(points), work, training.test()))
            due = work * 1.02
            if task.reaches(points[-1].value, task.targets[-1]):
                break
    run = Run(Key(task.name, "newton", None, batch, seed, 0.0, 0.0), "", points, {})
    first = run.first(task, task.targets[-1])
    return {"work": first.gradients if first else None, "best": run.best(task)}


def cell(task: Task, rows: list[Row]) -> str:
    work = sorted(row["work"] or WORK + 1 for row in rows)
    middle = statistics.median(work)
    best = value_text(task, statistics.median(row["best"] for row in rows), 3)
    return f"{middle:.0f}" if middle <= WORK else f"– ({best})"


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
            if variant == "exact from the second step" and name in ("letter", "satimage"):
                found[variant].append("")  # a step takes seconds there
                continue
            runs = [
                rows.get(
                    {"task": name, "variant": variant, "seed": seed},
                    partial(measure, task, make, seed, args.data_dir),
                )
                for seed in range(SEEDS)
            ]
            found[variant].append(cell(task, runs))
    if args.task:
        return
    lines = [[variant, *cells] for variant, cells in found.items()]
    targets = [f"{name}, {value_text(TASKS[name], TASKS[name].targets[-1])}" for name in NAMES]
    text = (
        f"Work to the target on the tasks of [results.md](results.md), in gradients of a step's batch (a forward pass "
        f"is a third; factorizations are not counted), medians of {SEEDS} seeds; “–” is a target not reached with "
        f"{WORK:.0f}, with the best value. Empty: a step would take seconds. {rows.machine()}\n\n"
        + table(["", *targets], lines)
        + "\n\nMade by `python -m benchmarks.flagship --data-dir DIR`."
    )
    write_section("newton.md", "flagship", text)


if __name__ == "__main__":
    main()
