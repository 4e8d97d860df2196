"""Tables in Markdown: one row a method; medians over the seeds, and in brackets each seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.suite.rows import Row
from benchmarks.suite.task import Task


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def task_table(task: Task, rows: Sequence[Row]) -> str:
    """Times, work and quality of every method; the best time and the best value are bold."""
    goals = [value_text(task, target) for target in task.targets]
    header = ["method", "batch", "rate", *(f"CPU s to {goal}" for goal in goals)]
    work = "" if len(goals) == 1 else f" to {' / '.join(goals)}"
    header += [f"{name}{work}" for name in ("failed", "steps", "gradients", *(["passes"] if task.samples else []))]
    header += [f"best {task.metric}", "settled", "CPU s of the rate search"]
    return table(header, (_cells(row, rows) for row in rows))


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    task = row.task
    fastest = [min(r.median_seconds(target) for r in rows) for target in task.targets]
    work = [row.median_work(target) for target in task.targets]
    passes = [row.median_passes(target) for target in task.targets]
    leader = (max if task.is_accuracy else min)(r.mean_best() for r in rows)
    rate = "–" if row.lr is None else f"{row.lr:g}{'*' if row.is_at_edge else ''}"
    return [
        row.entry.label,
        f"{row.entry.batch:,}" if row.entry.batch else "all",
        rate,
        *(_times(row, t, best) for t, best in zip(task.targets, fastest, strict=True)),
        " / ".join(f"{row.failures(t)} of {len(row.runs)}" for t in task.targets),
        " / ".join(f"{w[0]:,.0f}" if w else "–" for w in work),
        " / ".join(f"{w[1]:,.0f}" if w else "–" for w in work),
        *([" / ".join(number(p) for p in passes)] if task.samples else []),
        _bold(value_text(task, row.mean_best(), 2), row.mean_best() == leader),
        value_text(task, row.mean_settled(), 2),
        f"{row.search_seconds:.0f}" if row.search else "–",
    ]


def _times(row: Row, target: float, fastest: float) -> str:
    median, each = row.median_seconds(target), row.seconds(target)
    text = _bold(number(median), median == fastest and math.isfinite(median))
    if len(each) == 1 or math.isinf(min(each)):
        return text
    return f"{text} ({', '.join(number(t) for t in each)})"


def number(x: float) -> str:
    """Seconds or passes; – is not reached."""
    return "–" if math.isinf(x) else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def value_text(task: Task, value: float, digits: int = 1) -> str:
    """A test value: percent, or a number with an exponent where it is small."""
    if task.is_accuracy:
        return f"{100 * value:.{max(digits, 2 if round(1000 * value, 6) % 1 else 0)}f} %"
    if 0.1 <= abs(value) < 1000:
        return f"{value:.{digits + 2}g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if digits < 2 else mantissa}e{int(exponent)}"
