"""One picture a task: the test value over CPU time, a thin line for a seed, a thick one for their median.

And the performance profiles of all methods over all tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from benchmarks.suite.profiles import profile
from benchmarks.suite.rows import Row
from benchmarks.suite.store import Run
from benchmarks.suite.tables import value_text
from benchmarks.suite.task import Task
from torchnewton.train.figures import COLOURS, STYLE

MORE_COLOURS = {
    "newton-cg": "#0b9fb5",
    "adamw": "#f08c5a",
    "torchzero": "#868e96",
    "tlm": "#5c3d2e",
}
LIGHT_GREEN = "#8fbf6a"  # L-BFGS on mini-batches
POINTS = 90  # of a curve in a picture
ERRORS = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01, 0.005)
GAP = 0.055  # between two labels, as a fraction of the height

Array = NDArray[Any]


def draw(task: Task, rows: Sequence[Row], path: Path) -> None:
    """Writes the picture; accuracies are drawn as errors, so that 98 % and 99 % are apart."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel="CPU seconds of training, one thread")
        axes.set_title(f"{task.name}: {task.metric} over time", pad=12)
        for row in rows:
            _draw_row(axes, row)
        _set_limits(axes, task, rows)
        axes.xaxis.set_major_formatter("{x:g}")
        if task.is_accuracy:
            _accuracy_axis(axes)
        for target in task.targets:
            _draw_target(axes, task, target)
        _label(axes, rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw_row(axes: Any, row: Row) -> None:
    colour = _colour(row)
    if len(row.runs) > 1:
        for run in row.runs:
            axes.plot(*_curve(row.task, run), color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(*_median(row), color=colour, linewidth=2.4, solid_capstyle="round", zorder=3)


def _colour(row: Row) -> str:
    return colour_of(row.entry.method)


def colour_of(method: str) -> str:
    found = {**COLOURS, **MORE_COLOURS}
    return found.get(method) or found.get(method.split("-")[0] if not method.startswith("lbfgs") else "", LIGHT_GREEN)


def _error(task: Task, value: float) -> float:
    return max(1 - value, 1e-4) if task.is_accuracy else value


def _curve(task: Task, run: Run) -> tuple[Array, Array]:
    points = [(p.seconds, _error(task, p.value)) for p in run.points[1:] if p.value]
    points = points[:: max(1, len(points) // POINTS)] + points[-1:]
    return (np.array([x for x, _ in points]), np.array([y for _, y in points]))


def _median(row: Row) -> tuple[Array, Array]:
    """The median of the seeds' curves where all of them are defined."""
    curves = [c for c in (_curve(row.task, run) for run in row.runs) if len(c[0])]
    if len(curves) < 2:
        return curves[0] if curves else (np.empty(0), np.empty(0))
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.geomspace(start, max(start, end), POINTS)
    logs = [np.interp(np.log(grid), np.log(x), np.log(y)) for x, y in curves]
    return grid, np.exp(np.median(logs, axis=0))


def _set_limits(axes: Any, task: Task, rows: Sequence[Row]) -> None:
    """All values but those of a diverging start; time from where the eye has something to see."""
    curves = [_curve(task, run) for row in rows for run in row.runs]
    values = np.concatenate([y for _, y in curves])
    values = values[np.isfinite(values)]
    low, high = min(values.min(), _error(task, task.targets[-1])), np.quantile(values, 0.99)
    axes.set_ylim(low / 1.2, max(high, low) * 1.3)
    times = [x for x, _ in curves if len(x)]
    axes.set_xlim(max(min(x[0] for x in times), max(x[-1] for x in times) / 1000), max(x[-1] for x in times))


def _label(axes: Any, rows: Sequence[Row]) -> None:
    """Each method's name at the height of its curve's end, moved apart where they meet."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [(to_axes.transform((x[-1], y[-1])), row) for row in rows for x, y in [_median(row)] if len(x)]
    ends.sort(key=lambda end: end[0][1])
    heights = [float(np.clip(end[1], 0.02, 0.98)) for end, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + GAP)
    excess = max(0.0, heights[-1] - 1) if heights else 0.0
    for (end, row), height in zip(ends, heights, strict=True):
        colour, y = _colour(row), height - excess
        text = row.entry.label + (f", rate {row.lr:g}" if row.lr else "")
        axes.plot(*end, "o", color=colour, markersize=5, transform=axes.transAxes, clip_on=False, zorder=4)
        leader = {"color": colour, "linewidth": 0.8, "alpha": 0.6, "clip_on": False}
        axes.plot([end[0], 1.0, 1.02], [end[1], y, y], transform=axes.transAxes, zorder=1, **leader)
        axes.text(1.03, y, text, transform=axes.transAxes, color=colour, va="center", weight="bold")


def _draw_target(axes: Any, task: Task, target: float) -> None:
    y = _error(task, target)
    axes.axhline(y, color="#333d4b", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
    text = f"target {value_text(task, target)}"
    axes.annotate(text, (0.01, y), color="#333d4b", fontsize=9, **place)


def _accuracy_axis(axes: Any) -> None:
    axes.invert_yaxis()
    bottom, top = axes.get_ylim()
    ticks = [e for e in ERRORS if top <= e <= bottom]
    axes.set_yticks(ticks, [f"{100 * (1 - e):g} %" for e in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def alternative_text(task: Task, rows: Sequence[Row]) -> str:
    """What the picture says, for those who do not see it."""
    parts = [f"{row.entry.label} {value_text(task, row.mean_best(), 2)}" for row in rows]
    return f"{task.metric} over CPU time on {task.name}; best values: {', '.join(parts)}"


def draw_profiles(panels: Mapping[str, Mapping[str, list[float]]], labels: Mapping[str, str], path: Path) -> None:
    """Beside each other: the share of tasks that each method solves within a factor of the best."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axes, (title, ratios) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            taus = np.geomspace(1, 100, 200)
            for method, values in ratios.items():
                shares = [100 * profile(values, tau) for tau in taus]
                width = 2.6 if method == "newton" else 1.5
                axes.step(taus, shares, where="post", color=colour_of(method), linewidth=width, label=labels[method])
            axes.set(xscale="log", xlabel="at most so many times the best", ylabel="% of the tasks", title=title)
            axes.set_ylim(0, 102)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
