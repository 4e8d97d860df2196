"""What is trained: data, a network, a loss and a test value; every method is given a `Training`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchnewton.train.data import Dataset
from torchnewton.train.loop import loss_function

Batch = tuple[Tensor, ...]
Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and targets


@dataclass(frozen=True)
class Training:
    """A fresh network with its training data; `loss(batch)` is the mean loss, `test()` the test value."""

    model: nn.Module
    data: Batch
    size: int  # training samples
    loss: Callable[[Batch], Tensor]
    test: Callable[[], float]
    seed: int

    def batches(self, size: int | None) -> Iterator[Batch]:
        """Full batches of one shuffle after another; all samples as they lie without a `size` below their number."""
        if size is None or size >= self.size:
            while True:
                yield self.data
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(self.size, generator=generator)
            for index in order[: self.size - self.size % size].split(size):
                yield tuple(t[index] for t in self.data)


class Problem(Protocol):
    """Data that were read; makes trainings that differ in their seed."""

    def training(self, seed: int) -> Training:
        """A fresh network, and batches in an order of this seed."""
        ...


@dataclass(frozen=True)
class Supervised:
    """Inputs and targets. The test value is the accuracy for class numbers, the mean loss for all else.

    Without `loss`: mean squared error for values, cross entropy for class numbers.
    """

    data: Dataset
    network: Callable[[Dataset], nn.Module]
    loss: Loss = loss_function
    test_loss: bool = False  # the loss although there are classes
    on_training_data: bool = False

    def training(self, seed: int) -> Training:
        torch.manual_seed(seed)
        model, x, y = self.network(self.data), self.data.x_train, self.data.y_train
        test = (x, y) if self.on_training_data else (self.data.x_test, self.data.y_test)
        return Training(
            model,
            (x, y),
            len(x),
            lambda batch: self.loss(model(batch[0]), batch[1]),
            lambda: self.test(model, *test),
            seed,
        )

    @torch.no_grad()
    def test(self, model: nn.Module, x: Tensor, y: Tensor) -> float:
        output = model(x)
        if y.is_floating_point() or self.test_loss:
            return float(self.loss(output, y))
        return float((output.argmax(-1) == y).double().mean())


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

    def training(self, seed: int) -> Training:
        torch.manual_seed(seed)
        layers = [nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)]
        model = nn.Sequential(*layers).double()
        size = len(self.inside) + len(self.boundary)
        return Training(model, (), size, lambda batch: self.loss(model), lambda: self.test(model), seed)

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
