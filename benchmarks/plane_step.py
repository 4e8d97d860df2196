"""A step in the plane of the K-FAC direction and the previous step, in its parts, and the mean step of `Newton()`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.cases import Images, lenet, perceptron
from benchmarks.newton_step import measure_newton_steps
from benchmarks.plane_by_hand import step_by_hand
from benchmarks.plane_count import count
from benchmarks.timing import seconds
from torchnewton.curvature import KFAC
from torchnewton.train.loop import loss_function
from torchnewton.vectors import Vector, add_

DAMPING = 0.1
STATISTICS, INVERSES = 10, 40  # steps from one to the next
STEPS = 80

T = TypeVar("T")
Parts = dict[str, float]


def measure_plane_steps(images: Images) -> list[dict[str, Any]]:
    """Mean CPU seconds of a step, of its parts and of a gradient on the same batches, and those of `Newton()`.

    Both train the network from the same parameters.
    """
    rows = []
    for name, batch, make, data in networks(images):
        torch.manual_seed(0)
        row = {"network": name, "batch": batch, **_measure(make(), data, batch)}
        torch.manual_seed(0)
        rows.append({**row, "newton": measure_newton_steps(make(), data, batch)})
    return rows


def networks(images: Images) -> list[tuple[str, int, Callable[[], nn.Module], Images]]:
    """Name, batch, network and data of each row."""
    return [
        ("LeNet", 256, lenet, images),
        ("MLP 784-256-256-10", 512, lambda: perceptron(784, 256, 256, 10), images.flat()),
    ]


def _measure(model: nn.Module, data: Images, batch: int) -> dict[str, Any]:
    params = list(model.parameters())
    kfac = KFAC(statistics_every=STATISTICS, inverses_every=INVERSES)
    parts: Parts = defaultdict(float)
    step: Vector | None = None
    losses = []
    for number in range(-INVERSES, STEPS):  # the first are not counted: K-FAC learns faster in the beginning
        if number == 0:
            parts.clear()
        index = torch.randint(len(data.x), (batch,))
        x, y = data.x[index], data.y[index]

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss_function(model(x), y)

        _timed(parts, "gradient", lambda loss=loss: torch.autograd.grad(loss(), params))
        if step is not None:
            before, M, last = [p.detach().clone() for p in params], kfac.inverse(DAMPING), list(step)
            _timed(parts, "by hand", lambda x=x, y=y, M=M, last=last: step_by_hand(model, x, y, M, last, DAMPING))
            with torch.no_grad():
                torch._foreach_copy_(params, before)
        step, value = plane_step(loss, params, kfac, step, parts)
        losses.append(value)
    means = {name: total / STEPS for name, total in parts.items()}
    counted = count(tn.record(loss, params, create_graph=False), kfac, DAMPING)
    return {"seconds": means, "losses": [losses[0], sum(losses[-10:]) / 10], "count": counted}


def plane_step(
    loss: Callable[[], Tensor], params: list[nn.Parameter], kfac: KFAC, previous: Vector | None, parts: Parts
) -> tuple[Vector, float]:
    """Moves the parameters to the minimum of the damped model over the plane; the step and the loss before it."""

    def record() -> tn.Tape:
        tape = tn.record(loss, params, create_graph=False)
        _ = tape.descent
        return tape

    tape = _timed(parts, "recorded gradient", record)
    _timed(parts, "statistics", lambda: kfac.update(tape))
    M = _timed(parts, "inverses", lambda: kfac.inverse(DAMPING))
    direction = _timed(parts, "preconditioned gradient", lambda: M @ tape.descent)
    directions = [direction] if previous is None else [direction, previous]
    A = tn.GaussNewton(tape, tn.DifferenceJacobian(tape)) + DAMPING
    step = _timed(parts, "minimum over the plane", lambda: tn.Plane().over(A, tape.descent, directions)).solution
    with torch.no_grad():
        _timed(parts, "update", lambda: add_(params, step))
        _timed(parts, "check of the loss", loss)
    return step, float(tape.loss)


def _timed(parts: Parts, name: str, f: Callable[[], T]) -> T:
    found: list[T] = []
    parts[name] += seconds(lambda: found.append(f()))
    return found[0]
