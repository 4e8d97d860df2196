"""`Auto` beside each of its own choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.cases import Classifier, clusters, lenet, perceptron, sequences, train
from benchmarks.timing import measure
from torchnewton.train.loop import loss_function

ACCURACY = 1e-3
HOPELESS = 30  # choices stated to take so many times the operations of the cheapest are not tried
TOO_MANY = 5e12  # operations, about half a minute: not tried either
ROUNDS = 6


@dataclass(frozen=True)
class Row:
    """A network with `classes` outputs, to be solved on a batch.

    The squared error of the smallest network is fitted as by Levenberg-Marquardt's method: in double precision, with
    small damping.
    """

    network: str
    batch: int
    classes: int
    damping: float = 1e-3


def _sine(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    x = 2 * torch.rand(4096, 1) - 1
    y = torch.sin(10 * x) if classes == 1 else ((x + 1) * (classes / 2)).long().clamp(max=classes - 1).squeeze(1)
    model = perceptron(1, 20, 20, 20, classes, activation=nn.Sigmoid)
    for layer in model[::2]:
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    train(model, x, y, steps=2000, lr=2e-2)  # before these it is all but constant
    return (model.double(), x.double(), y.double()) if classes == 1 else (model, x, y)


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Tensor, Tensor]]] = {
    "sigmoid network 1-20-20-20-C": _sine,
    "MLP 784-256-256-C": lambda c: (perceptron(784, 256, 256, c), *clusters((784,), c)),
    "LeNet 28×28, C": lambda c: (lenet(c), *clusters((1, 28, 28), c)),
    "transformer 1×16, C a sequence": lambda c: (Classifier(c), *sequences(c)),
}
SINE, MLP, LENET, TRANSFORMER = NETWORKS
GRID = [
    Row(SINE, 1024, 1, damping=1e-6),
    Row(SINE, 32, 10),
    Row(SINE, 256, 100),
    Row(MLP, 256, 1),
    Row(MLP, 1024, 10),
    Row(MLP, 32, 100),
    Row(LENET, 1024, 1),
    Row(LENET, 256, 10),
    Row(LENET, 32, 100),
    Row(TRANSFORMER, 1024, 1),
    Row(TRANSFORMER, 256, 10),
    Row(TRANSFORMER, 32, 100),
]


def measure_row(row: Row, rounds: int = ROUNDS) -> dict[str, Any]:
    """CPU seconds of a solve by `Auto` and by each choice, what was chosen, and the relative residuals."""
    torch.manual_seed(0)
    model, x, y = NETWORKS[row.network](row.classes)
    train(model, x, y)
    params, x, y = list(model.parameters()), x[: row.batch], y[: row.batch]
    cg = tn.CG(rtol=ACCURACY, max_iterations=2000)
    auto = tn.Auto(cg=cg)
    results: dict[str, tn.SolveResult] = {}

    def solve(name: str, solver: Any, prepare: Callable[[tn.Tape], tn.GaussNewton]) -> tn.SolveResult:
        tape = tn.record(lambda: loss_function(model(x), y), params)
        results[name] = solver.solve(prepare(tape) + row.damping, tape.descent)
        return results[name]

    def explicit(tape: tn.Tape) -> tn.GaussNewton:
        return tn.GaussNewton(tape, tn.LayerJacobian(tape))

    def kept(tape: tn.Tape) -> tn.GaussNewton:
        return tn.GaussNewton(tape, tn.Jacobian(tape))

    tape = tn.record(lambda: loss_function(model(x), y), params)
    options = auto.options(tn.GaussNewton(tape) + row.damping, tape.descent)
    most = min(TOO_MANY, HOPELESS * min(operations for operations, _ in options.values()))
    tried = {name: solver for name, (operations, solver) in options.items() if operations < most}
    ways: dict[str, tuple[Any, Callable[[tn.Tape], tn.GaussNewton]]] = {"Auto": (auto, tn.GaussNewton)}
    ways |= {name: (solver, tn.GaussNewton) for name, solver in tried.items() if name != "CG"}
    ways["explicit CG"], ways["kept CG"] = (cg, explicit), (cg, kept)
    work = {"record": lambda: tn.record(lambda: loss_function(model(x), y), params).gradient}
    for name, (solver, prepare) in ways.items():
        work[name] = lambda name=name, solver=solver, prepare=prepare: solve(name, solver, prepare)
    times = measure(work, rounds)
    size = float(torch.cat([g.flatten() for g in tape.gradient]).norm())
    return {
        "network": row.network,
        "batch": row.batch,
        "classes": row.classes,
        "damping": row.damping,
        "seconds": times,
        "chosen": results["Auto"].method,
        "iterations": {name: result.num_iterations for name, result in results.items()},
        "residuals": {name: result.residual_norm / size for name, result in results.items()},
        "stated": {name: operations for name, (operations, _) in options.items()},
    }
