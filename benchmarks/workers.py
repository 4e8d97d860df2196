"""WorkerSecant beside averaging alone, synchronous SGD and SGN, at equal communication and at equal samples, on digits.

    python -m benchmarks.workers

Eight workers, a network of one hidden layer of 32 units. Written to benchmarks/results/studies/workers.jsonl, to the
section of docs/worker_secant.md, and to docs/figures/workers.svg.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import nn

import torchnewton as tn
from benchmarks.study import Row, Rows, batches, closure_over, measured, network, save, write_section
from benchmarks.suite.tables import table
from torchnewton.optim.secant import Form
from torchnewton.record import Closure
from torchnewton.train.data import Dataset, load
from torchnewton.train.figures import STYLE

M, BATCH, SEEDS = 8, 32, 3
COMMUNICATION, EPOCHS = 60.0, 20.0  # where runs are compared; all-reduces of the parameters, passes over the data
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
Stream = Iterator[tuple[torch.Tensor, torch.Tensor]]
Points = list[tuple[float, float, float, float]]  # all-reduces, passes, training loss, test error


class Averaging(tn.WorkerSecant):
    """Local SGD: the same local steps, then the mean of the parameters; no gradient at their end."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"]]
        start = [p.clone() for p in params]
        total = [torch.zeros_like(p) for p in params]
        sgd = torch.optim.SGD(params, lr=self.param_groups[0]["lr"])
        for _ in range(M):
            for p, x in zip(params, start, strict=True):
                p.copy_(x)
            for _ in range(self.local_steps):
                sgd.step(closure)
            for t, p in zip(total, params, strict=True):
                t.add_(p / M)
        for p, t in zip(params, total, strict=True):
            p.copy_(t)


@dataclass(frozen=True)
class Entry:
    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    batch: int = BATCH
    gradients: float = 0.0  # of a round, of one batch each; 0: what the report says
    rates: tuple[float, ...] = RATES
    common: int = 0  # the size of a batch on which all workers of a round take their last gradient; 0: their own


def secant(local_steps: int, num_workers: int = M, common: int = 0, **arguments: Any) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return tn.WorkerSecant(model.parameters(), lr=lr, local_steps=local_steps, num_workers=num_workers, **arguments)

    return Entry(make, common=common)


def averaging(local_steps: int) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return Averaging(model.parameters(), lr=lr, local_steps=local_steps, num_workers=M)

    return Entry(make, gradients=M * local_steps)


ENTRIES = {
    "synchronous SGD": Entry(lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr), M * BATCH, 1.0),
    "SGN": Entry(lambda model, lr: tn.SGN(model.parameters()), M * BATCH, rates=(0.0,)),
    **{f"averaging, {k} local steps": averaging(k) for k in (1, 4, 16)},
    **{f"secant, {k} local steps": secant(k) for k in (1, 4, 16)},
    "secant, symmetric, 4 local steps": secant(4, form="symmetric"),
    "secant, 4 local steps, 2 past rounds": secant(4, past_rounds=2),
    "secant, 4 local steps, common batch of 256": secant(4, common=256),
    "secant, symmetric, 4 local steps, common batch of 256": secant(4, form="symmetric", common=256),
}
GUARDS: dict[str, dict[str, Any]] = {
    "guarded": {"radius": 3.0, "cutoff": 1e-2},
    "default": {},
    "bare": {"descent": False, "cutoff": 1e-12},
}
STABILITY = {
    f"{form}, m = {m}, {guard}": secant(4, m, form=form, **arguments)
    for form in ("multi-secant", "symmetric")
    for m in (4, 8, 16, 32)
    for guard, arguments in GUARDS.items()
}


def with_common(own: Stream, common: Stream, local_steps: int) -> Stream:
    """The batches of a round: each worker's own for its local steps, then the same one for all."""
    while True:
        last = next(common)
        for _ in range(M):
            yield from (next(own) for _ in range(local_steps))
            yield last


def run(data: Dataset, entry: Entry, lr: float, seed: int, communication: float, epochs: float) -> Row:
    """Until both budgets are used; communication in all-reduces of the parameters by a ring: 2n(m − 1)/m numbers."""
    model = network("mlp:32", data, seed)
    optimizer = entry.make(model, lr)
    stream = batches(data, entry.batch, seed)
    if entry.common:
        stream = with_common(stream, batches(data, entry.common, seed + 100), optimizer.local_steps)
    draws = hasattr(optimizer, "calls_per_step")
    sent = samples = 0.0
    points: Points = [(0.0, 0.0, *measured(model, data))]
    all_reduce = 2 * 4 * sum(p.numel() for p in model.parameters()) * (M - 1) / M
    while (sent < communication or samples < epochs) and math.isfinite(points[-1][2]):
        batch = next(stream)
        optimizer.step(closure_over(model, stream if draws else iter([batch] * 1000)))
        report = getattr(optimizer, "report", None)
        if isinstance(optimizer, tn.WorkerSecant) and not isinstance(optimizer, Averaging):
            used, bytes_sent = report.gradient_equivalents, report.bytes_communicated
        elif report is not None and not draws:  # SGN: an all-reduce for the gradient and for each product
            used, bytes_sent = report.gradient_equivalents, (1 + report.products) * all_reduce
        else:
            used, bytes_sent = entry.gradients, all_reduce
        sent += bytes_sent / all_reduce
        samples += (used * entry.batch + M * (entry.common - entry.batch if entry.common else 0)) / len(data.x_train)
        points.append((round(sent, 2), round(samples, 3), *measured(model, data)))
    return {"points": points}


def at(row: Row, axis: int, limit: float) -> tuple[float, float]:
    """Training loss and test error at the last point within the limit; infinite after a divergence."""
    inside = [p for p in row["points"] if p[axis] <= limit]
    diverged = not math.isfinite(row["points"][-1][2]) and row["points"][-1][axis] <= limit
    return (math.inf, math.inf) if diverged else (inside[-1][2], inside[-1][3])


def median(runs: list[Row], axis: int, limit: float) -> tuple[float, float]:
    values = [at(row, axis, limit) for row in runs]
    return statistics.median(v[0] for v in values), statistics.median(v[1] for v in values)


def collect(rows: Rows, data: Dataset) -> dict[str, dict[int, tuple[float, list[Row]]]]:
    """For each method and budget the best rate by the training loss of the first seed, and all seeds at it."""
    found: dict[str, dict[int, tuple[float, list[Row]]]] = {}
    for name, entry in ENTRIES.items():

        def get(lr: float, seed: int, name: str = name, entry: Entry = entry) -> Row:
            key = {"study": "compare", "method": name, "lr": lr, "seed": seed}
            return rows.get(key, lambda: run(data, entry, lr, seed, COMMUNICATION, EPOCHS))

        found[name] = {}
        for axis, limit in ((0, COMMUNICATION), (1, EPOCHS)):
            lr = min(entry.rates, key=lambda lr: at(get(lr, 0), axis, limit)[0])
            found[name][axis] = lr, [get(lr, seed) for seed in range(SEEDS)]
    return found


def comparison(found: dict[str, dict[int, tuple[float, list[Row]]]]) -> str:
    header = ["method"]
    for budget in (f"{COMMUNICATION:g} all-reduces", f"{EPOCHS:g} passes"):
        header += [f"rate, {budget}", "training loss", "test error, %"]
    lines = []
    for name, budgets in found.items():
        line = [name]
        for axis, limit in ((0, COMMUNICATION), (1, EPOCHS)):
            lr, runs = budgets[axis]
            loss, error = median(runs, axis, limit)
            edge = "*" if lr and lr in (RATES[0], RATES[-1]) else ""
            line += [f"{lr:g}{edge}" if lr else "–", f"{loss:.3g}", f"{100 * error:.1f}"]
        lines.append(line)
    return table(header, lines)


def stability(rows: Rows, data: Dataset) -> str:
    """One rate, 30 rounds: the training loss, the worst of the way after the first ten."""
    lines = []
    for name, entry in STABILITY.items():
        runs = []
        for seed in range(2):
            key = {"study": "stability", "method": name, "lr": 0.1, "seed": seed}
            # a budget in passes that is met after 30 rounds of the m workers
            m = int(name.split("m = ")[1].split(",")[0])
            passes = 30 * m * 5 * BATCH / len(data.x_train) - 1e-6
            runs.append(rows.get(key, partial(run, data, entry, 0.1, seed, 0.0, passes)))
        last = [row["points"][-1][2] for row in runs]
        worst = [max(p[2] for p in row["points"][10:]) for row in runs]
        lines.append([name, *(f"{x:.3g}" for x in (*last, *worst))])
    header = ["secant step", "loss after 30 rounds, seed 0", "seed 1", "worst after round 10, seed 0", "seed 1"]
    return table(header, lines)


def least_squares(rows: Rows) -> str:
    """20 features of variances 1 … 1e-3, 32 workers: f − min f after 10 rounds, against the last gradient's batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 20, generator=generator).double() * torch.logspace(0, -1.5, 20).double()
    y = x @ torch.randn(20, generator=generator).double() * 3 + 0.1 * torch.randn(4000, generator=generator).double()
    least = float((x @ torch.linalg.lstsq(x, y[:, None]).solution - y[:, None]).square().mean())

    def measure(last: int, kind: str) -> Row:
        w = nn.Parameter(torch.zeros(20, dtype=torch.float64))
        torch.manual_seed(0)
        make = Averaging if kind == "averaging" else tn.WorkerSecant
        form: Form = "symmetric" if kind == "symmetric" else "multi-secant"
        optimizer = make([w], lr=0.1, local_steps=4, num_workers=32, form=form)
        calls = 0

        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            size = 10 if kind == "averaging" or calls % 5 else last
            index = torch.arange(4000) if size == 4000 else torch.randint(4000, (size,))
            w.grad = None
            loss = (x[index] @ w - y[index]).square().mean()
            loss.backward()
            return loss

        for _ in range(10):
            optimizer.step(closure)
        return {"excess": float((x @ w - y).detach().square().mean()) - least}

    lines = []
    for kind in ("averaging", "multi-secant", "symmetric"):
        found = [
            rows.get(
                {"study": "least squares", "method": kind, "last": last},
                partial(measure, last, kind),
            )["excess"]
            for last in (10, 100, 1000, 4000)
        ]
        lines.append([kind, *(f"{v:.1e}" for v in (found if kind != "averaging" else found[:1] * 4))])
    return table(["step", "10", "100", "1,000", "4,000, all"], lines)


def draw(found: dict[str, dict[int, tuple[float, list[Row]]]]) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 5.4), layout="constrained")
        titles = {0: "all-reduces of the parameters", 1: "passes over the data"}
        colours = {"sync": "#e0a100", "SGN": "#7a3fc4", "averaging": "#868e96", "symm": "#c2255c", "past": "#1f5fd0"}
        for axis, axes in enumerate(figure.subplots(1, 2)):
            for name, budgets in found.items():
                colour = next((c for word, c in colours.items() if word in name), "#12715b")
                style = ":" if "16" in name else "--" if " 1 " in name else "-." if "common" in name else "-"
                points = [p for p in budgets[axis][1][0]["points"] if p[axis] <= (COMMUNICATION, EPOCHS)[axis]]
                axes.plot([p[axis] for p in points], [p[2] for p in points], style, color=colour, label=name)
            axes.set(xlabel=titles[axis], ylabel="training loss", yscale="log", ylim=(4e-3, 5))
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
        save(figure, "workers")


def main() -> None:
    torch.set_num_threads(1)
    rows, data = Rows("workers"), load("digits", Path("data"))
    found = collect(rows, data)
    unstable = stability(rows, data)
    draw(found)
    text = f"{comparison(found)}\n\n{unstable}\n\n{least_squares(rows)}\n\n{rows.machine()}"
    write_section("worker_secant.md", "workers", text)


if __name__ == "__main__":
    main()
