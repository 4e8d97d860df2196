"""The tasks: targets, budgets in CPU seconds, and the methods with their batches and rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import torchnewton as tn
from benchmarks.problems import DataProblem, Poisson, Problem
from torchnewton.train.methods import METHODS


@dataclass(frozen=True)
class Entry:
    """A method on a task: `make(model, lr)`; `batch` None is all samples; no `rates`, nothing to choose.

    An entry that `goes_on` may use the task's limit where it has not reached the target in the common time.
    """

    method: str
    label: str
    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    batch: int | None
    rates: tuple[float, ...] = ()
    goes_on: bool = False


@dataclass(frozen=True)
class Task:
    """Every run has `seconds`, a run of the rate search `search_seconds`; `limit` see `Entry`."""

    name: str
    text: str
    metric: str
    targets: tuple[float, ...]  # from easy to strict
    seconds: float
    search_seconds: float
    limit: float
    problem: Callable[[Path], Problem]
    entries: tuple[Entry, ...]

    @property
    def is_accuracy(self) -> bool:
        return self.metric == "test accuracy"

    def reaches(self, value: float | None, target: float) -> bool:
        if value is None:
            return False
        return value >= target if self.is_accuracy else value <= target

    def quick(self) -> Task:
        """A smoke test: the same work on a twentieth of the budget."""
        seconds, search, limit = (x / 20 for x in (self.seconds, self.search_seconds, self.limit))
        return replace(self, seconds=seconds, search_seconds=search, limit=limit)


def newton(batch: int | None) -> Entry:
    return Entry("newton", "Newton", lambda model, lr: tn.Newton(model.parameters()), batch, goes_on=True)


def sgn(batch: int, max_iterations: int) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return tn.SGN(model.parameters(), max_iterations=max_iterations)

    return Entry("sgn", f"SGN, {max_iterations} CG iterations", make, batch, goes_on=True)


def lbfgs(batch: int | None = None) -> Entry:
    if batch is None:
        return Entry("lbfgs", "L-BFGS", METHODS["lbfgs"].make, None, goes_on=True)
    return Entry(f"lbfgs-{batch}", "L-BFGS, mini-batches", METHODS["lbfgs"].make, batch)


def sgd(batch: int | None, rates: tuple[float, ...]) -> Entry:
    return Entry("sgd", "SGD, momentum 0.9", METHODS["sgd"].make, batch, rates)


def adam(batch: int | None) -> Entry:
    return Entry("adam", "Adam", METHODS["adam"].make, batch, (0.001, 0.003, 0.01, 0.03, 0.1))


SINE = Task(
    "sine-10",
    "y = sin(10x) + 0.01·noise on [−1, 1], so that the noise floor is 1e-4: 7,000 training and 3,000 test "
    "samples, 1-20-20-20-1 with sigmoids, weights from N(0, 1), squared error.",
    "test MSE",
    targets=(1.1e-4,),
    seconds=16,
    search_seconds=6,
    limit=40,
    problem=partial(DataProblem, "sine:10", "sigmoid-mlp:20-20-20"),
    entries=(
        newton(250),
        sgn(1000, max_iterations=20),
        lbfgs(),
        lbfgs(1000),
        sgd(100, (0.01, 0.03, 0.1, 0.3, 1.0)),
        adam(100),
    ),
)
MNIST = Task(
    "mnist-mlp",
    "MNIST divided by 255, 784-20-20-20-10 with sigmoids, weights from N(0, 1), cross entropy.",
    "test accuracy",
    targets=(0.94,),
    seconds=12,
    search_seconds=6,
    limit=60,
    problem=partial(DataProblem, "mnist", "sigmoid-mlp:20-20-20"),
    entries=(
        newton(1000),
        sgn(1000, max_iterations=5),
        replace(lbfgs(), goes_on=False),
        lbfgs(10_000),
        sgd(128, (0.03, 0.1, 0.3, 1.0, 3.0)),
        adam(128),
    ),
)
DIGITS = Task(
    "digits",
    "The digits of scikit-learn, 1,437 training and 360 test images of 8×8 pixels; the small convolutional "
    "network that `torchnewton train` trains when it is given no argument, cross entropy.",
    "test accuracy",
    targets=(0.975,),
    seconds=10,
    search_seconds=4,
    limit=20,
    problem=partial(DataProblem, "digits", "cnn"),
    entries=(
        newton(METHODS["newton"].small_batch),
        sgn(METHODS["sgn"].small_batch, max_iterations=10),
        lbfgs(),
        sgd(METHODS["sgd"].small_batch, METHODS["sgd"].rates),
        adam(METHODS["adam"].small_batch),
    ),
)
POISSON = Task(
    "poisson",
    "−Δu = f on the unit square with u = 0 on its boundary, solution sin(πx)·sin(πy), as a physics-informed "
    "network: 2-32-32-1 with tanh, float64, 900 points inside and 120 on the boundary, the mean squares of "
    "Δu + f and of u on the boundary added; relative L2 error on a 61×61 grid.",
    "relative error",
    targets=(1e-1, 1e-2, 1e-3),
    seconds=20,
    search_seconds=6,
    limit=30,
    problem=lambda data_dir: Poisson(),
    entries=(
        newton(None),
        lbfgs(),
        sgd(None, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        adam(None),
    ),
)
TASKS = {task.name: task for task in (SINE, MNIST, DIGITS, POISSON)}
