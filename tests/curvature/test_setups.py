"""Models and data as operator libraries test them, against matrices made by torch.func from the functional model.

Dictionaries as inputs, sequences as outputs, soft labels, shared weights, every reduction, several batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, flat
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev
from zoo import integers, uniform

import torchnewton as tn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Setup:
    """A model, its batches (input, target), and a loss of (outputs, target, reduction), N or N·C entries."""

    model: nn.Module
    batches: list[tuple[Any, Tensor]]
    loss: Callable[[Tensor, Tensor, str], Tensor]
    over_entries: bool


class Shared(nn.Module):
    """One weight matrix, used twice, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class OfDictionary(nn.Module):
    """Takes {"x": …} as tokenizers give it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(batch["x"])


class Sequences(nn.Module):
    """(N, T, D) in, one prediction for each token out, flattened to (N·T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.embed(x)).cumsum(1)).flatten(0, 1)


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, width))


def _cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 2))


def _cross_entropy(z: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(z, y, reduction=reduction)


def _mse(z: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.mse_loss(z, y, reduction=reduction)


def _bce(z: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, reduction=reduction)


def _batches(x: Tensor, y: Tensor, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """The first has `count` samples, the second what is left."""
    return [(x[:count], y[:count]), (x[count:], y[count:])]


X, IMAGES, TEXT = uniform(6, 3).double(), uniform(6, 1, 3, 3).double(), uniform(6, 2, 3).double()
LABELS, VALUES, SOFT = integers(3, 6), uniform(6, 2, seed=4).double(), uniform(6, 2, low=0.0, seed=5).double()


def build(name: str) -> Setup:
    torch.manual_seed(1)
    setup = {
        "classification": lambda: Setup(_mlp(3), _batches(X, LABELS), _cross_entropy, False),
        "regression": lambda: Setup(_mlp(2), _batches(X, VALUES), _mse, True),
        "convolution": lambda: Setup(_cnn(), _batches(IMAGES, VALUES), _mse, True),
        "soft labels": lambda: Setup(_mlp(2), _batches(X, SOFT), _bce, True),
        "class probabilities": lambda: Setup(_mlp(2), _batches(X, SOFT.softmax(1)), _cross_entropy, False),
        "shared weight": lambda: Setup(Shared(), _batches(X, LABELS), _cross_entropy, False),
        "dictionary": lambda: Setup(
            OfDictionary(_mlp(3)), [({"x": x}, y) for x, y in _batches(X, LABELS)], _cross_entropy, False
        ),
        "sequence": lambda: Setup(
            Sequences(),
            [(TEXT[:4], integers(3, 8)), (TEXT[4:], integers(3, 4))],
            _cross_entropy,
            False,
        ),
    }[name]()
    setup.model.double()
    return setup


NAMES = [
    "classification",
    "regression",
    "convolution",
    "soft labels",
    "class probabilities",
    "shared weight",
    "dictionary",
    "sequence",
]


def functional(model: nn.Module, batch: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(θ, θ ↦ outputs)."""
    named = dict(model.named_parameters())

    def f(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in named.values()])
        return functional_call(
            model, {k: v.view(p.shape) for (k, p), v in zip(named.items(), parts, strict=True)}, batch
        )

    return flat(list(named.values())), f


def references(s: Setup, batch: Any, y: Tensor, reduction: str) -> dict[Any, Tensor]:
    """H, G and F of one batch."""
    theta, f = functional(s.model, batch)
    z = f(theta)
    J = jacrev(f)(theta).reshape(z.numel(), -1)
    B = hessian(lambda u: s.loss(u.view(z.shape), y, reduction))(z.reshape(-1))
    divisor = 1 if reduction == "sum" else len(z) * (z.shape[1] if s.over_entries else 1)
    rows = torch.stack(
        [grad(lambda t, n=n: s.loss(f(t)[n : n + 1], y[n : n + 1], "sum"))(theta) for n in range(len(z))]
    )
    return {
        tn.Hessian: hessian(lambda t: s.loss(f(t), y, reduction))(theta),
        tn.GaussNewton: J.T @ B @ J,
        tn.EmpiricalFisher: rows.T @ rows / divisor,
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_one_batch_and_the_average_of_two(name, reduction):
    s = build(name)
    params = list(s.model.parameters())

    def loss_of_batch(batch: tuple[Any, Tensor]) -> Tensor:
        return s.loss(s.model(batch[0]), batch[1], reduction)

    found = [references(s, x, y, reduction) for x, y in s.batches]
    for curvature in found[0]:
        for batch, expected in zip(s.batches, found, strict=True):
            A = curvature(tn.record(lambda batch=batch: loss_of_batch(batch), params))
            v = torch.randn(len(expected[curvature]), dtype=torch.float64)
            assert_close(A @ v, expected[curvature] @ v)
            assert_close(A.to_dense(), expected[curvature])
        mean = (4 * found[0][curvature] + 2 * found[1][curvature]) / 6
        A = tn.Average(s.batches, params, loss_of_batch, curvature=curvature)
        assert_close(A @ v, mean @ v)


@pytest.mark.parametrize("name", NAMES)
def test_the_average_over_batches_is_that_of_the_data(name):
    """With a mean loss, weighted by samples, however the data are cut."""
    s = build(name)
    params = list(s.model.parameters())
    if isinstance(s.batches[0][0], dict):
        x = {"x": torch.cat([b[0]["x"] for b in s.batches])}
    else:
        x = torch.cat([b[0] for b in s.batches])
    y = torch.cat([b[1] for b in s.batches])
    for curvature, expected in references(s, x, y, "mean").items():
        A = tn.Average(s.batches, params, lambda b: s.loss(s.model(b[0]), b[1], "mean"), curvature=curvature)
        assert_close(A.to_dense(), expected)
