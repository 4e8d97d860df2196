"""The picture of `torchnewton spectrum`: a panel for each method, all on the same axes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from torchnewton.analysis.spectral import FLAT
from torchnewton.analysis.spectral import FLAT_NAME as NAME
from torchnewton.train.display import number
from torchnewton.train.figures import COLOURS, STYLE, wrapped
from torchnewton.train.spectrum import EndPoint

WIDTH = 0.1  # of the kernel, in decades
_OTHER = "#33475b"
_TEXT: dict[str, Any] = {"fontsize": 9.5, "color": "#333d4b"}


def draw(title: str, groups: Mapping[str, Sequence[EndPoint]], form: str, path: Path) -> None:
    """Densities with their error bands on a logarithmic axis, and marks for the extreme eigenvalues."""
    points = [p for group in groups.values() for p in group]
    low = min(p.smallest for p in points)
    high = max(p.largest for p in points)
    one = min(1 / p.spectrum.size for p in points) / (WIDTH * math.sqrt(2 * math.pi))  # the peak of one eigenvalue
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 4.3 * len(groups)), 4.4), layout="constrained")
        panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (label, group) in zip(panels, groups.items(), strict=True):
            axes.set_xscale("asinh", linear_width=FLAT)
            axes.set_yscale("log")
            _panel(axes, label, group, one)
        _ticks(panels[0], low, high)
        panels[0].annotate(
            "one eigenvalue",
            (0.46, one),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            va="top",
            **_TEXT,
        )
        figure.suptitle(
            wrapped(title, figure.get_figwidth()), x=0.01, ha="left", fontsize=13, fontweight="bold", parse_math=False
        )
        panels[0].set_ylabel("share of eigenvalues per decade")
        panels[0].set_ylim(bottom=0.25 * one, top=30)
        figure.supxlabel("eigenvalue λ", fontsize=11)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type")) if form == "svg" else {}
        figure.savefig(path, format=form, dpi=130, metadata=nothing)


def _panel(axes: Any, label: str, group: Sequence[EndPoint], one: float) -> None:
    colour = COLOURS.get(group[0].settings.method, _OTHER)
    axes.axvspan(-FLAT, FLAT, color="#eef1f5", zorder=0)
    axes.axhline(one, color="#8a94a3", linewidth=0.8, linestyle=(0, (4, 3)))
    for p in group:
        found = p.spectrum.density(linear_width=FLAT, width=WIDTH, num_points=400)
        x, y, error = found.grid.numpy(), found.value, found.standard_error
        floor = torch.tensor(0.01 * one)
        alpha = 1.0 if len(group) == 1 else 0.75
        axes.fill_between(
            x, torch.maximum(y - error, floor).numpy(), (y + error).numpy(), color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(x, torch.maximum(y, floor).numpy(), color=colour, linewidth=1.3, alpha=alpha)
        ends = torch.cat([p.spectrum.largest.values, p.spectrum.smallest.values])
        axes.plot(ends.numpy(), [0.36 * one] * len(ends), "|", color=colour, ms=9, mew=1.1, alpha=alpha)
    axes.set_title(label, color=colour, parse_math=False)
    axes.annotate(_notes(group), (0.98, 0.97), xycoords="axes fraction", va="top", ha="right", **_TEXT)


def _notes(group: Sequence[EndPoint]) -> str:
    loss = statistics.fmean(p.loss for p in group)
    largest = statistics.fmean(p.largest for p in group)
    flat = statistics.fmean(p.flat.value for p in group)
    lines = [f"loss {number(loss)}", f"largest λ {number(largest)}", f"|λ| < {NAME}: {flat:.0%}"]
    return "\n".join(lines + ([f"means of {len(group)} seeds"] if len(group) > 1 else []))


def _ticks(axes: Any, low: float, high: float) -> None:
    """Powers of ten on both sides of 0, as far as the eigenvalues go; every second one with its name."""
    first = round(math.log10(FLAT)) + 1
    ticks, names = [0.0], ["0"]
    for sign, end in ((1, high), (-1, -low)):
        for k in range(first, math.floor(math.log10(max(end, FLAT))) + 1):
            ticks.append(sign * 10.0**k)
            names.append(_power(sign, k) if (k - first) % 2 else "")
    axes.set_xticks(ticks, names)
    axes.xaxis.set_minor_locator(NullLocator())


def _power(sign: int, k: int) -> str:
    return ("−" if sign < 0 else "") + ({0: "1", 1: "10"}.get(k) or f"$10^{{{k}}}$")
