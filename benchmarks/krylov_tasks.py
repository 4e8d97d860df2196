"""What `benchmarks.krylov` trains: four networks to a training loss, Newton-Krylov beside others and beside itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.suite.methods import adam, lbfgs, sgn, with_closure
from benchmarks.suite.problems import Supervised, Training
from benchmarks.suite.task import Entry, Task
from torchnewton.train import data, models
from torchnewton.train.errors import UsageError

SAMPLE = 10_000  # training samples at most whose loss is looked at


ADAM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


class TrainingLoss:
    """A task of `torchnewton train` with its model; what is looked at is the training loss."""

    def __init__(self, spec: str, model: str, folder: Path) -> None:
        self.whole = Supervised(data.load(spec, folder), lambda found: models.build(model, found))

    def training(self, seed: int) -> Training:
        whole = self.whole.training(seed)
        return replace(whole, test=lambda: self.test(whole))

    @torch.no_grad()
    def test(self, training: Training) -> float:
        return float(training.loss((training.data[0][:SAMPLE], training.data[1][:SAMPLE])))


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

    def training(self, seed: int) -> Training:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for sizes in pairwise(self.sizes):
            layer = nn.Linear(*sizes)
            nn.init.xavier_normal_(layer.weight, gain=4.0)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.Sigmoid()]
        model = nn.Sequential(*layers[:-1])
        loss = partial(self.loss, model)
        return Training(model, (self.x,), len(self.x), lambda batch: loss(batch[0]), lambda: self.test(model), seed)

    @staticmethod
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)

    @torch.no_grad()
    def test(self, model: nn.Module) -> float:
        return float(self.loss(model, self.x[:2000]))


def krylov(batch: int | None) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return tn.NewtonKrylov(model.parameters())

    return Entry("newton-krylov", "Newton-Krylov", with_closure(make), batch)


def halves(batch: int | None) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return tn.NewtonKrylov(model.parameters(), disagreement=1.0)

    return Entry("halves", "– with the test of halves", with_closure(make), batch)


def to_tolerance(batch: int | None) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return ToTolerance(model.parameters())

    return Entry("to-tolerance", "– CG to its tolerance", with_closure(make), batch)


class ToTolerance(tn.NewtonKrylov):
    """Newton-Krylov whose CG ends for no reason but 1e-3, 100 iterations, or pᵀHp ≤ 0, where it cannot go on."""

    def solver_at(self, num_steps: int) -> tn.UntilDisturbed:
        """The same in every step; the step is shortened to the radius."""
        return tn.UntilDisturbed(tn.CG(rtol=1e-3, max_iterations=100), epsilon=0.0, radius=self.radius)


def newton_cg(batch: int | None) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return tn.NewtonCG(model.parameters())

    return Entry("newton-cg", "Newton-CG", with_closure(make), batch)


def entries(batch: int, adam_batch: int, max_iterations: int) -> tuple[Entry, ...]:
    """All methods at one batch, Adam at a smaller one, too, and L-BFGS on all samples."""
    small, same = adam(adam_batch, ADAM_RATES), adam(batch, ADAM_RATES)
    return (
        krylov(batch),
        halves(batch),
        to_tolerance(batch),
        sgn(batch, max_iterations),
        newton_cg(batch),
        small,
        Entry("adam-same-batch", "Adam, the same batch", same.start, batch, same.rates, goes_on=False),
        lbfgs(None),
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
    problem=partial(TrainingLoss, "sine:10", "sigmoid-mlp:20-20-20"),
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
    problem=partial(TrainingLoss, "mnist", "sigmoid-mlp:20-20-20"),
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
    problem=partial(TrainingLoss, "digits", "cnn"),
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
