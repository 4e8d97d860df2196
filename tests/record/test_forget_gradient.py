"""A gradient that was given back is found again, and products do without it."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchnewton as tn


def penalty(loss, model):
    return loss + 0.1 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:part of the loss reaches the parameters")
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("kind", ["split", "split and a rest", "no split"])
def test_forgotten_gradient(kind, create_graph):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params, x = list(model.parameters()), torch.randn(5, 3, dtype=torch.float64)

    def closure():
        if kind == "no split":
            return model(x).square().sum()
        loss = F.mse_loss(model(x), x[:, :2])
        return penalty(loss, model) if kind == "split and a rest" else loss

    expected = tn.record(closure, params)
    tape = tn.record(closure, params, create_graph=create_graph)
    gradient = weakref.ref(tape.gradient[0])
    tape.forget_gradient()
    assert gradient() is None
    curvature = tn.Hessian if kind == "no split" else tn.GaussNewton
    for found, there in zip(curvature(tape) @ params, curvature(expected) @ params, strict=True):
        torch.testing.assert_close(found, there, rtol=1e-14, atol=1e-14)
    for found, there in zip(tape.gradient, expected.gradient, strict=True):
        torch.testing.assert_close(found, there, rtol=1e-14, atol=1e-14)
