"""Pictures: the curves of one run, and the panels of a comparison."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from torchnewton.train.loop import Record

Array = NDArray[Any]

COLOURS = {
    "newton": "#1f5fd0",
    "sgn": "#7a3fc4",
    "adam": "#d9480f",
    "sgd": "#e0a100",
    "lbfgs": "#2b8a3e",
    "muon": "#c2255c",
    "newton-krylov": "#0c8599",
    "newton-krylov-complex-step": "#66a3b0",
    "newton-cg": "#5c7cfa",
    "distributed-newton": "#82a80d",
    "hessian-free": "#343a40",
    "entropy-sgd": "#8f5e2b",
    "dc-asgd": "#868e96",
    "worker-secant": "#12715b",
}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": "#8a94a3",
    "axes.labelcolor": "#333d4b",
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ee",
    "xtick.color": "#5b6675",
    "ytick.color": "#5b6675",
    "svg.fonttype": "none",
    "svg.hashsalt": "torchnewton",
}


@dataclass(frozen=True)
class Curves:
    """One method's curves: one list of records a seed."""

    method: str
    runs: Sequence[Sequence[Record]]


@dataclass(frozen=True)
class Panel:
    """One picture: what is drawn over what."""

    title: str
    x: str
    y: str
    xlabel: str
    ylabel: str


def panels(metric: str) -> list[Panel]:
    """The three panels of a comparison."""
    accuracy = metric == "accuracy"
    label = "test accuracy" if accuracy else "test mean squared error"
    seconds, work = "CPU seconds", "gradient-equivalents, in passes over the data"
    return [
        Panel("Training loss over time", "cpu_seconds", "train_loss", seconds, "training loss"),
        Panel("Training loss over work", "data_passes", "train_loss", work, "training loss"),
        Panel(
            f"{label.capitalize()} over time",
            "cpu_seconds",
            "error" if accuracy else "test_loss",
            seconds,
            label,
        ),
    ]


def line(axes: Any, x: Any, y: Any, **style: Any) -> None:
    """A line, with a mark where it is a single point."""
    axes.plot(x, y, marker="o" if np.isfinite(y).sum() == 1 else None, **style)


def wrapped(title: str, inches: float) -> str:
    """A title in lines that fit so wide a picture."""
    return textwrap.fill(title, round(9 * inches), break_on_hyphens=False)


def tell_if_empty(axes: Any) -> None:
    """Says so where no number can be drawn."""
    is_log = axes.get_yscale() == "log"
    y = np.concatenate([drawn.get_ydata() for drawn in axes.lines])
    if not (np.isfinite(y) & ((y > 0) | (not is_log))).any():
        what = "no finite positive values" if is_log else "no finite values"
        for drawn in axes.lines:
            drawn.set_visible(False)
        axes.set(xscale="linear", yscale="linear", xticks=[], yticks=[])
        axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color="#5b6675")


def plot_run(history: Sequence[Record], metric: str, path: Path) -> None:
    """Draws `curves.png` of one run: losses, the test metric and, for Newton methods, the damping."""
    with matplotlib.rc_context(STYLE):
        damped = [r for r in history if r.damping]
        figure = Figure(figsize=(12 if damped else 8.4, 3.6), layout="constrained")
        axes = figure.subplots(1, 3 if damped else 2)
        epochs = [r.epoch for r in history]
        axes[0].set(title="Loss", yscale="log")
        line(axes[0], epochs, [r.train_loss for r in history], color="#1f5fd0", label="training")
        line(axes[0], epochs, [r.test_loss for r in history], color="#d9480f", label="test")
        axes[0].legend(frameon=False)
        axes[1].set(title=f"Test {metric}", yscale="linear" if metric == "accuracy" else "log")
        line(axes[1], epochs, [r.metric for r in history], color="#d9480f")
        if damped:
            line(axes[2], [r.epoch for r in damped], [r.damping for r in damped], color="#1f5fd0")
            axes[2].set(title="Damping λ", yscale="log")
        for axis in axes:
            axis.set_xlabel("epoch")
            tell_if_empty(axis)
        figure.savefig(path, format="png", dpi=130)


def panel_svg(panel: Panel, curves: Iterable[Curves], floor: float) -> str:
    """One panel as SVG to be put into HTML: text stays text, and nothing points outside."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 3.6), layout="constrained")
        _draw(figure.subplots(), panel, curves, floor)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r'\s(xmlns(:\w+)?)="[^"]*"', "", svg[svg.index("<svg") :])
    return re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", svg, count=2)


def comparison_png(title: str, metric: str, curves: Sequence[Curves], floor: float, path: Path) -> None:
    """All panels as one picture with one legend."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 4.6), layout="constrained")
        for axes, panel in zip(figure.subplots(1, 3), panels(metric), strict=True):
            _draw(axes, panel, curves, floor)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=12)
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", parse_math=False)
        figure.savefig(path, format="png", dpi=130)


def _draw(axes: Any, panel: Panel, curves: Iterable[Curves], floor: float) -> None:
    """Thin lines for the seeds and a thick one for their median, on logarithmic axes.

    Accuracies are drawn as errors on a reversed logarithmic axis with labels in percent of accuracy, which
    keeps 98 % and 99 % apart; `floor` stands for no error at all.
    """
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, xscale="log", yscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    for curve in curves:
        colour = COLOURS[curve.method]
        lines = [_points(run, panel, floor) for run in curve.runs]
        for x, y in lines:
            line(axes, x, y, color=colour, linewidth=0.9, alpha=0.4)
        line(axes, *_median(lines), color=colour, linewidth=2.4, label=curve.method, solid_capstyle="round")
    if panel.y == "error":
        axes.invert_yaxis()
        bottom, top = axes.get_ylim()
        ticks = [e for e in (0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if top <= e <= bottom]
        axes.set_yticks(ticks, [f"{100 * (1 - e):g} %" for e in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
    tell_if_empty(axes)


def _points(run: Sequence[Record], panel: Panel, floor: float) -> tuple[Array, Array]:
    """The points of one run that a logarithmic panel can show."""
    x = np.array([getattr(r, panel.x) for r in run])
    if panel.y == "error":
        y = np.array([max(1 - r.metric, floor) for r in run])
    else:
        y = np.array([getattr(r, panel.y) for r in run])
    keep = (x > 0) & (y > 0) & np.isfinite(y)
    return x[keep], y[keep]


def _median(lines: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The median of the lines where all of them are defined."""
    lines = [(x, y) for x, y in lines if len(x)]
    if len(lines) < 2:
        return lines[0] if lines else (np.empty(0), np.empty(0))
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.geomspace(start, max(start, end), 200)
    logs = [np.interp(np.log(grid), np.log(x), np.log(y)) for x, y in lines]
    return grid, np.exp(np.median(logs, axis=0))
