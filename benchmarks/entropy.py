"""Entropy-SGD beside SGD on digits: epochs to a training loss, test error there, and how flat the place is.

    python -m benchmarks.entropy

A network of 910 parameters, so that all eigenvalues of its Hessian over the training data are computed. Written to
benchmarks/results/studies/entropy.jsonl, the section of docs/entropy_sgd.md, and docs/figures/entropy.svg.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import nn

import torchnewton as tn
from benchmarks.study import Row, Rows, network, save, write_section
from benchmarks.suite.tables import table
from torchnewton.train.data import Dataset, load
from torchnewton.train.figures import STYLE
from torchnewton.train.loop import Budget, Run, loss_function, train, training_loss

LOSSES = (0.1, 0.03)
SEEDS, BATCH, EPOCHS = 3, 64, 200
Make = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(lr: float) -> Make:
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)


def entropy(inner_lr: float, inner_steps: int = 20, scope: float = 0.03) -> Make:
    return lambda model: tn.EntropySGD(model.parameters(), inner_lr=inner_lr, inner_steps=inner_steps, scope=scope)


METHODS = {
    "SGD, rate 0.01": sgd(0.01),
    "SGD, rate 0.03": sgd(0.03),
    "SGD, rate 0.1": sgd(0.1),
    "Entropy-SGD, L = 20, η' = 0.003": entropy(0.003),
    "Entropy-SGD, L = 20, η' = 0.01": entropy(0.01),
    "Entropy-SGD, L = 20, η' = 0.03": entropy(0.03),
    "Entropy-SGD, L = 20, η' = 0.1": entropy(0.1),
    "Entropy-SGD, L = 5, η' = 0.01": entropy(0.01, inner_steps=5),
    "Entropy-SGD, L = 20, η' = 0.01, γ₀ = 1": entropy(0.01, scope=1.0),
}


def run(data: Dataset, method: str, loss: float, seed: int) -> Row:
    model = network("mlp:12", data, seed)
    generator = torch.Generator().manual_seed(seed)
    subject = Run(data, model, METHODS[method](model), BATCH, generator)
    status = train(subject, Budget(epochs=EPOCHS, loss=loss))
    reached = status == "training loss reached"
    found = {"reached": reached, "epochs": subject.epoch, "loss": training_loss(subject)}
    if not reached:
        return found
    model.eval().double()
    x = data.x_train.double()
    tape = tn.record(lambda: loss_function(model(x), data.y_train), list(model.parameters()))
    spectrum = tn.spectrum(tn.Hessian(tape))
    return found | {
        "error": 1 - (subject.history[-1].test_accuracy or 0.0),
        "gradient": sum(float(g.square().sum()) for g in tape.gradient) ** 0.5,
        "largest": float(spectrum.largest.values[0]),
        "smallest": float(spectrum.smallest.values[0]),
        "trace": float(spectrum.trace.value),
        "flat": float(spectrum.share().value),
    }


def runs_of(rows: Rows, data: Dataset, method: str, loss: float) -> list[Row]:
    return [
        rows.get({"method": method, "loss": loss, "seed": seed}, partial(run, data, method, loss, seed))
        for seed in range(SEEDS)
    ]


def spread(runs: list[Row], name: str, scale: float = 1.0, digits: int = 2) -> str:
    values = [scale * row[name] for row in runs]
    return f"{statistics.fmean(values):.{digits}g} ± {statistics.stdev(values) if len(values) > 1 else 0:.1g}"


def section(found: dict[float, dict[str, list[Row]]]) -> str:
    parts = []
    header = [
        "method",
        "epochs",
        "‖g‖",
        "largest λ",
        "smallest λ",
        "trace",
        "share with abs(λ) < 1e-4, %",
        "test error, %",
    ]
    for loss, methods in found.items():
        lines = []
        for method, runs in methods.items():
            good = [row for row in runs if row["reached"]]
            if len(good) < len(runs):
                lines.append([f"{method}: {len(good)} of {len(runs)} runs get there", *["–"] * (len(header) - 1)])
            if good:
                cells = [("epochs", 1.0), ("gradient", 1.0), ("largest", 1.0), ("smallest", 1.0), ("trace", 1.0)]
                numbers = [spread(good, name, scale, 3) for name, scale in cells]
                lines.append([method, *numbers, spread(good, "flat", 100, 3), spread(good, "error", 100, 2)])
        parts.append(f"At a training loss of {loss:g}:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def draw(found: dict[float, dict[str, list[Row]]]) -> None:
    """Each run a point: how sharp, against what it cost."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, (loss, methods) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
            for i, (method, runs) in enumerate(methods.items()):
                good = [row for row in runs if row["reached"]]
                marker, colour = (
                    ("o", mpl.colormaps["YlOrBr"]) if method.startswith("SGD") else ("s", mpl.colormaps["winter"])
                )
                shade = colour(0.4 + 0.2 * i) if method.startswith("SGD") else colour((i - 3) / 5)
                xs, ys = [r["epochs"] for r in good], [r["largest"] for r in good]
                axes.plot(xs, ys, marker, color=shade, label=method, markersize=7, alpha=0.85)
            axes.set(title=f"at training loss {loss:g}", xlabel="passes over the data", ylabel="largest eigenvalue",
                     xscale="log", yscale="log")  # fmt: skip
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("{x:g}")
                axis.set_tick_params(which="minor", labelsize=8)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        save(figure, "entropy")


def main() -> None:
    torch.set_num_threads(1)
    rows, data = Rows("entropy"), load("digits", Path("data"))
    found = {loss: {method: runs_of(rows, data, method, loss) for method in METHODS} for loss in LOSSES}
    draw(found)
    write_section("entropy_sgd.md", "entropy", f"{section(found)}\n\n{rows.machine()}")


if __name__ == "__main__":
    main()
