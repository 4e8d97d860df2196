"""What is trained: data sets of `torchnewton.train`, and a Poisson equation as a physics-informed network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Trial
from torchnewton.train import data, models
from torchnewton.train.loop import loss_function

Make = Callable[[nn.Module], torch.optim.Optimizer]


class Problem(Protocol):
    def trial(self, make: Make, batch: int | None, seed: int) -> Trial:
        """A fresh network and an optimizer on it; without `batch` every step sees all samples."""
        ...


class DataProblem:
    """A data set and a model by their names in `torchnewton train`; accuracy, or mean squared error."""

    def __init__(self, spec: str, model: str, data_dir: Path) -> None:
        self.data = data.load(spec, data_dir)
        self.model = model

    def trial(self, make: Make, batch: int | None, seed: int) -> Trial:
        torch.manual_seed(seed)
        model, x, y = models.build(self.model, self.data), self.data.x_train, self.data.y_train
        indices = batches(len(x), batch or len(x), torch.Generator().manual_seed(seed))

        def draw() -> Callable[[], Tensor]:
            index = next(indices)
            xs, ys = (x, y) if index is None else (x[index], y[index])
            return lambda: loss_function(model(xs), ys)

        return Trial(make(model), draw, lambda: self.test(model))

    @torch.no_grad()
    def test(self, model: nn.Module) -> float:
        output, y = model(self.data.x_test), self.data.y_test
        if y.is_floating_point():
            return float(F.mse_loss(output, y))
        return float((output.argmax(-1) == y).double().mean())


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor | None]:
    """Full batches of one shuffle after another; None stands for all samples as they lie."""
    while True:
        if size >= n:
            yield None
        else:
            order = torch.randperm(n, generator=generator)
            yield from order[: n - n % size].split(size)


class Poisson:
    """−Δu = f on the unit square, u = 0 on its boundary, solved by u = sin(πx)·sin(πy).

    A float64 network 2-32-32-1 with tanh; 900 cell centres inside and 30 points a side. The test value is
    the relative L2 error on a 61×61 grid.
    """

    def __init__(self, cells: int = 30, nodes: int = 61) -> None:
        centres = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        zero, one = torch.zeros_like(centres), torch.ones_like(centres)
        sides = [(centres, zero), (centres, one), (zero, centres), (one, centres)]
        line = torch.linspace(0, 1, nodes, dtype=torch.float64)
        self.inside = torch.cartesian_prod(centres, centres)
        self.boundary = torch.cat([torch.stack(side, 1) for side in sides])
        self.grid = torch.cartesian_prod(line, line)
        self.source = 2 * math.pi**2 * self.solution(self.inside)

    @staticmethod
    def solution(x: Tensor) -> Tensor:
        return torch.sin(math.pi * x).prod(1, keepdim=True)

    def trial(self, make: Make, batch: int | None, seed: int) -> Trial:
        torch.manual_seed(seed)
        layers = [nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)]
        model = nn.Sequential(*layers).double()
        return Trial(make(model), lambda: lambda: self.loss(model), lambda: self.test(model))

    def loss(self, model: nn.Module) -> Tensor:
        x = self.inside.clone().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        residual, edge = (second[0] + second[1]).unsqueeze(1) + self.source, model(self.boundary)
        return F.mse_loss(residual, torch.zeros_like(residual)) + F.mse_loss(edge, torch.zeros_like(edge))

    @torch.no_grad()
    def test(self, model: nn.Module) -> float:
        exact = self.solution(self.grid)
        return float((model(self.grid) - exact).norm() / exact.norm())
