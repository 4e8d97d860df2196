"""What a run prints: a row for each evaluation and, on a terminal, a live line for the current step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from typing_extensions import Self

from torchnewton.train.loop import Budget, Record, Run, step_report

_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, with a dash for none.

    >>> number(0.000123456), number(None)
    ('0.000123', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Three significant digits in s, ms or µs.

    >>> duration(1234.0), duration(12.34), duration(0.0005), duration(2.5e-9), duration(0.0)
    ('1,230 s', '12.3 s', '500 µs', '0.00250 µs', '0 s')
    """
    if seconds == 0:
        return "0 s"
    rounded = float(f"{seconds:.3g}")
    unit, size = next(((unit, size) for unit, size in _UNITS if rounded >= size), _UNITS[-1])
    shown = rounded / size
    return f"{shown:,.0f} {unit}" if shown >= 1000 else f"{shown:#.3g}".rstrip(".") + f" {unit}"


def metric(value: float | None, name: str) -> str:
    """An accuracy in percent or a mean squared error."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.2%}" if name == "accuracy" else f"{value:.3g}"


def best_metric(history: Sequence[Record], name: str) -> float:
    """The best test metric on the way; NaN where there is none."""
    return (max if name == "accuracy" else min)((r.metric for r in history if r.is_finite()), default=math.nan)


class Display:
    """A context manager around a run; without a terminal it prints the rows alone."""

    WIDTHS = (8, 8, 11, 11, 10, 9, 7, 6, 8)

    def __init__(self, console: Console, run: Run, budget: Budget) -> None:
        self.console, self.budget, self.metric = console, budget, run.data.metric
        self.progress = Progress(
            BarColumn(24),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=1.0)
        self.inner = self.progress.add_task("", visible=False)

    def __enter__(self) -> Self:
        self._print(("epoch", "step", "train loss", f"test {self.metric}", "λ", "ρ", "inner", "work", "CPU s"), "bold")
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def show_progress(self, stage: str, number: int, count: int | None) -> None:
        """Updates the line of a pass over the data within a step."""
        description = f"{stage}, batch {number} of {count}"
        self.progress.update(self.inner, completed=number, total=count, description=description, visible=True)

    def show_step(self, run: Run) -> None:
        """Updates the live line."""
        if self.progress.disable:
            return
        report = step_report(run)
        text = f"step {run.step}  loss {number(run.loss)}  {run.cpu_seconds:.1f} s"
        if report:
            damping, ratio = number(report.damping, 2), number(report.reduction_ratio, 2)
            text += f"  λ {damping}  ρ {ratio}  inner {report.inner_iterations}"
        self.progress.update(self.inner, visible=False)
        self.progress.update(self.task, completed=min(1.0, self.budget.used(run)), description=text)

    def show_record(self, record: Record) -> None:
        """Prints one evaluation."""
        inner = "–" if record.inner_iterations is None else str(record.inner_iterations)
        cells = (
            f"{record.epoch:.4g}",
            str(record.step),
            number(record.train_loss),
            metric(record.metric, self.metric),
        )
        newton = (number(record.damping, 2), number(record.reduction_ratio, 2), inner)
        self._print((*cells, *newton, f"{record.data_passes:.1f}", f"{record.cpu_seconds:.2f}"))

    def _print(self, cells: tuple[str, ...], style: str | None = None) -> None:
        line = " ".join(cell.rjust(width) for cell, width in zip(cells, self.WIDTHS, strict=True))
        self.console.print(line, style=style, soft_wrap=True)


def summary(run: Run, status: str) -> Table:
    """The run in one table."""
    last, name = run.history[-1], run.data.metric
    epochs = f"{last.epoch:.4g} epoch" + ("" if last.epoch == 1 else "s")
    table = Table(title=f"{status} after {epochs}", title_justify="left", show_header=False)
    held = run.best
    chosen = ((f"test {name} of the best on validation", metric(held.metric, name)),) if held else ()
    for label, value in (
        (f"test {name}", metric(last.metric, name)),
        (f"best test {name}", metric(best_metric(run.history, name), name)),
        *chosen,
        ("train loss", number(last.train_loss)),
        ("steps", str(run.step)),
        (
            "gradient-equivalents",
            f"{run.gradient_equivalents:.0f} batches, {last.data_passes:.1f} passes over the data",
        ),
        ("CPU seconds of training", f"{run.cpu_seconds:.2f}"),
    ):
        table.add_row(label, value)
    return table
