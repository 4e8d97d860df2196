"""What `benchmarks.krylov` trains: four networks to a training loss, Newton-Krylov beside others and beside itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.measure import Trial
from benchmarks.problems import DataProblem, Make, batches
from benchmarks.tasks import Entry, Task, adam, lbfgs, sgn
from torchnewton.train import data
from torchnewton.train.errors import UsageError
from torchnewton.train.loop import loss_function

SAMPLE = 10_000  # training samples at most whose loss is looked at


class LossProblem(DataProblem):
    """The same task; what is looked at is the training loss."""

    @torch.no_grad()
    def test(self, model: nn.Module) -> float:
        x, y = self.data.x_train[:SAMPLE], self.data.y_train[:SAMPLE]
        return float(loss_function(model(x), y))


class Autoencoder:
    """784-250-30-250-784 with sigmoids on 10,000 images of MNIST; 64-40-10-40-64 on digits where there is no MNIST.

    Weights from N(0, 16 · 2 / (fan in + fan out)), which suits sigmoids, biases 0. The loss is the cross entropy of the
    pixels as probabilities, summed over an image.
    """

    def __init__(self, data_dir: Path) -> None:
        try:
            x, self.sizes = data.load("mnist", data_dir).x_train, [784, 250, 30, 250, 784]
        except UsageError:
            x, self.sizes = data.load("digits", data_dir).x_train, [64, 40, 10, 40, 64]
        x = x[:SAMPLE].flatten(1)
        self.x = (x - x.min()) / (x.max() - x.min())

    def trial(self, make: Make, batch: int | None, seed: int) -> Trial:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for sizes in pairwise(self.sizes):
            layer = nn.Linear(*sizes)
            nn.init.xavier_normal_(layer.weight, gain=4.0)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.Sigmoid()]
        model = nn.Sequential(*layers[:-1])
        indices = batches(len(self.x), batch or len(self.x), torch.Generator().manual_seed(seed))

        def draw() -> Callable[[], Tensor]:
            index = next(indices)
            x = self.x if index is None else self.x[index]
            return lambda: self.loss(model, x)

        return Trial(make(model), draw, lambda: self.test(model))

    @staticmethod
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)

    @torch.no_grad()
    def test(self, model: nn.Module) -> float:
        return float(self.loss(model, self.x[:2000]))


def krylov(batch: int | None) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return tn.NewtonKrylov(model.parameters())

    return Entry("newton-krylov", "Newton-Krylov", make, batch, goes_on=True)


def halves(batch: int | None) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return tn.NewtonKrylov(model.parameters(), disagreement=1.0)

    return Entry("halves", "– with the test of halves", make, batch, goes_on=True)


def to_tolerance(batch: int | None) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return ToTolerance(model.parameters())

    return Entry("to-tolerance", "– CG to its tolerance", make, batch, goes_on=True)


class ToTolerance(tn.NewtonKrylov):
    """Newton-Krylov whose CG ends for no reason but 1e-3, 100 iterations, or pᵀHp ≤ 0, where it cannot go on."""

    def solver_at(self, num_steps: int) -> tn.UntilDisturbed:
        """The same in every step; the step is shortened to the radius."""
        return tn.UntilDisturbed(tn.CG(rtol=1e-3, max_iterations=100), epsilon=0.0, radius=self.radius)


def newton_cg(batch: int | None) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return tn.NewtonCG(model.parameters())

    return Entry("newton-cg", "Newton-CG", make, batch, goes_on=True)


def entries(batch: int, adam_batch: int, max_iterations: int) -> tuple[Entry, ...]:
    """All methods at one batch, Adam at a smaller one, too, and L-BFGS on all samples."""
    small, same = adam(adam_batch), adam(batch)
    return (
        krylov(batch),
        halves(batch),
        to_tolerance(batch),
        sgn(batch, max_iterations),
        newton_cg(batch),
        replace(small, goes_on=True),
        Entry("adam-same-batch", "Adam, the same batch", same.make, batch, same.rates),
        lbfgs(),
    )


SINE = Task(
    "krylov-sine-10",
    "The task sine-10 above: 1-20-20-20-1 with sigmoids; the mean squared error on the training data, whose noise "
    "floor is 1e-4.",
    "training loss",
    targets=(2e-4,),
    seconds=4,
    search_seconds=3,
    limit=12,
    problem=partial(LossProblem, "sine:10", "sigmoid-mlp:20-20-20"),
    entries=entries(1000, 100, max_iterations=20),
)
MNIST = Task(
    "krylov-mnist-mlp",
    "The task mnist-mlp above: 784-20-20-20-10 with sigmoids, cross entropy. Looked at on 10,000 of the training "
    "images.",
    "training loss",
    targets=(0.3,),
    seconds=6,
    search_seconds=1.5,
    limit=14,
    problem=partial(LossProblem, "mnist", "sigmoid-mlp:20-20-20"),
    entries=entries(10_000, 128, max_iterations=5),
)
DIGITS = Task(
    "krylov-digits",
    "The task digits above: a small convolutional network, cross entropy on the training images.",
    "training loss",
    targets=(0.1,),
    seconds=4,
    search_seconds=1.5,
    limit=8,
    problem=partial(LossProblem, "digits", "cnn"),
    entries=entries(256, 64, max_iterations=10),
)
AUTOENCODER = Task(
    "krylov-autoencoder",
    " ".join(f"{Autoencoder.__doc__} Looked at on 2,000 of the images.".split()),
    "training loss",
    targets=(140.0,),
    seconds=8,
    search_seconds=3,
    limit=18,
    problem=Autoencoder,
    entries=entries(1000, 128, max_iterations=10),
)
TASKS = {task.name: task for task in (SINE, MNIST, DIGITS, AUTOENCODER)}
