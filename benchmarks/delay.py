"""Test error against delay: ASGD, DC-ASGD in both forms, and SGD, on digits and MNIST.

    python -m benchmarks.delay --data-dir DIR

One hidden layer of 32 units. Each method and delay at three rates; written to benchmarks/results/studies/delay.jsonl,
the section of docs/dcasgd.md, and docs/figures/delay.svg.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import torchnewton as tn
from benchmarks.study import Row, Rows, batches, closure_over, measured, network, save, write_section
from benchmarks.suite.tables import table
from torchnewton.train.data import Dataset, load
from torchnewton.train.figures import STYLE

DELAYS = (0, 1, 2, 4, 8, 16, 32)
RATES = (0.03, 0.1, 0.3)
METHODS: dict[str, dict[str, Any]] = {
    "ASGD": {"compensation": 0.0},
    "DC-ASGD, λ = 0.04": {"compensation": 0.04},
    "DC-ASGD, adaptive, λ₀ = 2": {"compensation": 2.0, "adaptive": True},
}
COLOURS = {"ASGD": "#868e96", "DC-ASGD, λ = 0.04": "#e0a100", "DC-ASGD, adaptive, λ₀ = 2": "#1f5fd0"}
TASKS = {"digits": (15, 3), "mnist": (1, 1)}  # epochs, seeds
BATCH = 32


def run(data: Dataset, method: str, delay: int, lr: float, seed: int, epochs: int) -> Row:
    model = network("mlp:32", data, seed)
    optimizer = tn.DCASGD(model.parameters(), lr=lr, delay=delay, **METHODS[method])
    closure = closure_over(model, batches(data, BATCH, seed))
    for _ in range(epochs * (len(data.x_train) // BATCH)):
        optimizer.step(closure)
    loss, error = measured(model, data)
    return {"loss": loss, "error": error}


def study(data: Dataset, rows: Rows) -> dict[str, dict[int, dict[float, list[Row]]]]:
    epochs, seeds = TASKS[data.name]
    return {
        method: {
            delay: {
                lr: [
                    rows.get(
                        {"task": data.name, "method": method, "delay": delay, "lr": lr, "seed": seed},
                        partial(run, data, method, delay, lr, seed, epochs),
                    )
                    for seed in range(seeds)
                ]
                for lr in RATES
            }
            for delay in DELAYS
        }
        for method in METHODS
    }


def mean(runs: list[Row]) -> float:
    return statistics.fmean(row["error"] for row in runs)


def best_rate(at: dict[float, list[Row]]) -> float:
    """By the training loss; a run that diverged comes last."""
    losses = {lr: statistics.fmean(row["loss"] for row in runs) for lr, runs in at.items()}
    return min(losses, key=lambda lr: losses[lr] if losses[lr] == losses[lr] else float("inf"))


def section(found: dict[str, Any]) -> str:
    parts = []
    for name, methods in found.items():
        epochs, seeds = TASKS[name]
        fixed = best_rate(methods["ASGD"][0])
        lines = []
        for method, delays in methods.items():
            lines.append([f"{method}, rate {fixed:g}", *(f"{100 * mean(d[fixed]):.1f}" for d in delays.values())])
            chosen = {delay: best_rate(at) for delay, at in delays.items()}
            cells = [f"{100 * mean(delays[d][lr]):.1f} ({lr:g})" for d, lr in chosen.items()]
            lines.append([f"{method}, best rate", *cells])
        text = (
            f"**{name}**, epochs: {epochs}, batches of {BATCH}, seeds: {seeds}, test error in %, mean. The fixed rate "
            "is that of the lowest training loss of SGD, the column of delay 0; the best rate, in brackets, that of "
            "the lowest training loss at that delay."
        )
        parts.append(f"{text}\n\n{table(['delay', *map(str, DELAYS)], lines)}")
    return "\n\n".join(parts)


def draw(found: dict[str, Any]) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, (name, methods) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            fixed = best_rate(methods["ASGD"][0])
            for method, delays in methods.items():
                for style, errors in (
                    ("-", [mean(d[fixed]) for d in delays.values()]),
                    (":", [mean(d[best_rate(d)]) for d in delays.values()]),
                ):
                    label = f"{method}{', best rate' if style == ':' else f', rate {fixed:g}'}"
                    axes.plot(range(len(DELAYS)), [100 * e for e in errors], style, marker="o", markersize=4,
                              color=COLOURS[method], label=label, linewidth=2)  # fmt: skip
            axes.set(title=name, xlabel="delay, updates", yscale="log", ylabel="test error, %")
            axes.set_xticks(range(len(DELAYS)), [str(d) for d in DELAYS])
            axes.set_yticks([3, 5, 10, 20, 50, 90], ["3", "5", "10", "20", "50", "90"])
            axes.yaxis.set_minor_locator(NullLocator())
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        save(figure, "delay")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, found = Rows("delay"), {}
    for name in TASKS:
        found[name] = study(load(name, args.data_dir), rows)
    draw(found)
    write_section("dcasgd.md", "delay", f"{section(found)}\n\n{rows.machine()}")


if __name__ == "__main__":
    main()
