"""Newton in a skorch net, which hands its optimizer a learning rate that Newton does not take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier, NeuralNetRegressor
from torch import nn

import torchnewton as tn


def newton(params, lr):
    """skorch passes `lr` to every optimizer."""
    return tn.Newton(params)


def classification():
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=60)
    x = rng.normal(size=(60, 4)) + 2 * np.eye(4)[y]
    return x.astype(np.float32), y


@pytest.mark.parametrize(
    ("criterion", "last"), [(nn.CrossEntropyLoss, nn.Identity), (nn.NLLLoss, lambda: nn.Softmax(dim=1))]
)
def test_classifier(criterion, last):
    """skorch takes the logarithm of the probabilities itself before NLLLoss."""
    x, y = classification()
    torch.manual_seed(0)
    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), last()),
        criterion=criterion,
        optimizer=newton,
        max_epochs=8,
        batch_size=30,
        train_split=None,
        verbose=0,
    )
    net.fit(x, y)
    losses = net.history[:, "train_loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert net.score(x, y) > 0.85
    assert isinstance(net.optimizer_, tn.Newton)
    assert net.optimizer_.report.accepted


def test_regressor():
    x = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    torch.manual_seed(0)
    net = NeuralNetRegressor(
        nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)),
        optimizer=newton,
        max_epochs=30,
        batch_size=-1,
        train_split=None,
        verbose=0,
    )
    net.fit(x, np.sin(3 * x))
    losses = net.history[:, "train_loss"]
    assert losses[-1] < 0.05 * losses[0]
