"""The networks of the products' benchmark, with data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchnewton.train import data
from torchnewton.train.errors import UsageError
from torchnewton.train.loop import loss_function
from torchnewton.train.models import CharTransformer
from torchnewton.train.simplenn import network

Case = tuple[nn.Module, Tensor, Tensor]

MLP = "MLP 784-1000-1000-10, batch 512"
CNN = "CNN_4layers at 32×32×3, batch 128"
TRANSFORMER = "transformer 4×64, 32 windows of 64"
SINE = "sine network, batch 1000"


def perceptron(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def cnn_4layers() -> nn.Sequential:
    """CNN_4layers of simpleNN at 32×32×3."""
    return network("cnn4", (3, 32, 32), 10)


def lenet(classes: int = 10) -> nn.Sequential:
    """LeNet on 28×28 pixels, 44,426 parameters with 10 classes."""
    convolutions = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), *perceptron(256, 120, 84, classes))


class Classifier(nn.Module):
    """A causal transformer over characters, one output of `classes` numbers a sequence."""

    def __init__(self, classes: int, vocabulary: int = 32, window: int = 32, width: int = 16) -> None:
        super().__init__()
        self.body = CharTransformer(vocabulary, window, width, heads=2, depth=1)
        self.body.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(ids).mean(1)


def _mlp() -> Case:
    return perceptron(784, 1000, 1000, 10), torch.randn(512, 784), torch.randint(10, (512,))


def _cnn() -> Case:
    return cnn_4layers(), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


def _transformer() -> Case:
    return CharTransformer(65, 64, depth=4), torch.randint(65, (32, 64)), torch.randint(65, (32, 64))


def _sine() -> Case:
    x = 2 * torch.rand(1000, 1) - 1
    return perceptron(1, 20, 20, 20, 1, activation=nn.Sigmoid), x, torch.sin(10 * x)


CASES: dict[str, Callable[[], Case]] = {MLP: _mlp, CNN: _cnn, TRANSFORMER: _transformer, SINE: _sine}


@dataclass(frozen=True)
class Images:
    """Training data N × 1 × 28 × 28, and what it is."""

    x: Tensor
    y: Tensor
    source: str

    def flat(self) -> Images:
        """N × 784."""
        return replace(self, x=self.x.flatten(1))

    def coloured(self) -> Images:
        """N × 3 × 32 × 32: every image in a random colour."""
        colours = torch.rand(len(self.x), 3, 1, 1, generator=torch.Generator().manual_seed(0))
        return replace(self, x=F.pad(self.x, [2, 2, 2, 2]) * colours)


def images(data_dir: Path, count: int = 20_000) -> Images:
    """MNIST from `data_dir`; without its files the digits of scikit-learn, enlarged."""
    try:
        found = data.load("mnist", data_dir)
        return Images(found.x_train[:count], found.y_train[:count], "MNIST")
    except UsageError:
        found = data.load("digits", data_dir)
        x = F.interpolate(found.x_train, size=(28, 28), mode="bilinear")
        return Images(x, found.y_train, "the digits of scikit-learn, enlarged to 28×28 (no MNIST files were given)")


def clusters(shape: tuple[int, ...], classes: int, count: int = 4096) -> tuple[Tensor, Tensor]:
    """Gaussian clusters, one a class, a tenth of the labels wrong; one class stands for a value to fit."""
    centres, noise = torch.randn(max(classes, 10), *shape), torch.randn(count, *shape)
    label = torch.randint(len(centres), (count,))
    x = 0.5 * centres[label] + noise
    if classes == 1:
        return x, label.float().div_(len(centres)).unsqueeze(1) + 0.1 * torch.randn(count, 1)
    return x, torch.where(torch.rand(count) < 0.1, torch.randint(classes, (count,)), label)


def sequences(classes: int, count: int = 4096, vocabulary: int = 32, window: int = 32) -> tuple[Tensor, Tensor]:
    """Sequences from one frequency of characters a class; one class stands for a value to fit."""
    frequencies = torch.randn(max(classes, 10), vocabulary).softmax(1)
    label = torch.randint(len(frequencies), (count,))
    x = torch.multinomial(frequencies[label], window, replacement=True)
    return x, label.float().div_(len(frequencies)).unsqueeze(1) if classes == 1 else label


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 100, lr: float = 1e-3, batch: int = 128) -> None:
    """Steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        index = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        loss_function(model(x[index]), y[index]).backward()
        optimizer.step()
