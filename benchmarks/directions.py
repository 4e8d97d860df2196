"""Damped Gauss-Newton directions, by every way to the same accuracy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchnewton as tn
from benchmarks import peers
from benchmarks.cases import Images, cnn_4layers, perceptron, train
from benchmarks.timing import measure
from torchnewton.train.loop import loss_function
from torchnewton.vectors import flatten

DAMPING = 1e-3
ACCURACY = 1e-3
MAX_ITERATIONS = 1000
ROUNDS = 8

MLP, CNN = "MLP 784-1000-1000-10", "CNN_4layers"
BATCHES = ((MLP, 64), (MLP, 128), (MLP, 256), (CNN, 64))


def measure_directions(images: Images, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """For each network and batch: CPU seconds, iterations and true relative residuals of every way."""
    made: tuple[tuple[str, Callable[[], nn.Module], Images], ...] = (
        (MLP, lambda: perceptron(784, 1000, 1000, 10), images.flat()),
        (CNN, cnn_4layers, images.coloured()),
    )
    networks = {}
    for name, make, data in made:
        torch.manual_seed(0)
        model = make()
        train(model, data.x, data.y)
        networks[name] = model, data
    rows = []
    for name, batch in BATCHES:
        model, data = networks[name]
        rows.append({"network": name, "batch": batch, **_row(model, data.x[-batch:], data.y[-batch:], rounds)})
    return rows


def _row(model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    params = list(model.parameters())
    solutions: dict[str, list[Tensor]] = {}
    iterations: dict[str, int] = {}
    cg = tn.CG(rtol=ACCURACY, max_iterations=MAX_ITERATIONS)

    def loss() -> Tensor:
        return loss_function(model(x), y)

    def solve(name: str, solver: Any, explicit: bool) -> None:
        tape = tn.record(loss, params, create_graph=not explicit)  # as `Newton` does after such a step
        jacobian = tn.LayerJacobian(tape) if explicit else tn.Jacobian(tape)
        result = solver.solve(tn.GaussNewton(tape, jacobian) + DAMPING, tape.descent)
        iterations[name] = result.num_iterations
        solutions[name] = result.solution

    def peer() -> None:
        b = [-g for g in torch.autograd.grad(loss(), params)]
        operator = peers.gauss_newton(model, x, y)
        found = peers.damped_solution(operator, b, DAMPING, ACCURACY, MAX_ITERATIONS)
        solutions["curvlinops, SciPy's CG"], iterations["curvlinops, SciPy's CG"] = [found[0]], found[1]

    work: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(loss(), params),
        "dual": lambda: solve("dual", tn.Dual(rtol=ACCURACY), explicit=True),
        "explicit CG": lambda: solve("explicit CG", cg, explicit=True),
        "kept CG": lambda: solve("kept CG", cg, explicit=False),
        "curvlinops, SciPy's CG": peer,
    }
    times = measure(work, rounds)
    return {"seconds": times, "iterations": iterations, "residuals": true_residuals(model, x, y, solutions)}


def true_residuals(model: nn.Module, x: Tensor, y: Tensor, solutions: dict[str, list[Tensor]]) -> dict[str, float]:
    """‖b − (G + λI)d‖ / ‖b‖ in double precision, by a kept product on a network of its own."""
    model = copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    params = list(model.parameters())
    tape = tn.record(lambda: loss_function(model(x), y.double() if y.is_floating_point() else y), params)
    A = tn.GaussNewton(tape, tn.Jacobian(tape)) + DAMPING
    b = torch.cat([g.flatten() for g in tape.descent])
    directions = {name: flatten(d).double() for name, d in solutions.items()}
    return {name: float((b - A @ d).norm() / b.norm()) for name, d in directions.items()}
