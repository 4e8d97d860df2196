"""The networks of the tasks that are no models of `torchnewton train`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from torchnewton.train import models
from torchnewton.train.data import Dataset

Network = Callable[[Dataset], nn.Module]


def named(spec: str) -> Network:
    """A model of `torchnewton train`."""
    return lambda data: models.build(spec, data)


def dense(*hidden: int, activation: type[nn.Module] = nn.ReLU) -> Network:
    """Linear layers with PyTorch's own initial weights."""

    def build(data: Dataset) -> nn.Module:
        sizes = [math.prod(data.x_train.shape[1:]), *hidden, models.outputs(data)]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
        return nn.Sequential(nn.Flatten(), *layers[:-1])

    return build


def sigmoid(*hidden: int) -> Network:
    """Sigmoids, weights from N(0, 16 · 2 / (fan in + fan out)), which suits them, biases 0."""

    def build(data: Dataset) -> nn.Module:
        model = dense(*hidden, activation=nn.Sigmoid)(data)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight, gain=4.0)
                nn.init.zeros_(layer.bias)
        return model

    return build


def cnn_4layers(data: Dataset) -> nn.Module:
    """CNN_4layers of Wang, Tan, Lin, arXiv 1811.06100: weights from N(0, 2 / fan in), biases 0."""
    channels, height, width = data.x_train.shape[1:]
    layers: list[nn.Module] = []
    for inputs, filters, size in ((channels, 32, 5), (32, 64, 3), (64, 64, 3)):
        layers += [nn.Conv2d(inputs, filters, size, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (height // 8) * (width // 8), models.outputs(data)))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return model


def small_cnn(data: Dataset) -> nn.Module:
    """The 1,026 parameters of the MNIST example of torch-levenberg-marquardt: five convolutions with ELU."""
    layers: list[nn.Module] = []
    for inputs, filters, size, stride in ((1, 8, 4, 2), (8, 4, 4, 2), (4, 4, 2, 1), (4, 4, 2, 1), (4, 4, 2, 1)):
        layers += [nn.Conv2d(inputs, filters, size, stride), nn.ELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10))


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """‖z − y‖² for y one-hot, summed over the classes, the mean of the samples."""
    target = F.one_hot(y, output.shape[1]).to(output.dtype)
    return F.mse_loss(output, target, reduction="sum") / len(y)


def pixel_entropy(output: Tensor, x: Tensor) -> Tensor:
    """Cross entropy of the pixels as probabilities, summed over an image, the mean of the images."""
    return F.binary_cross_entropy_with_logits(output, x, reduction="sum") / len(x)
