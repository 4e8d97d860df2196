"""The references themselves, against closed forms and a second way to compute them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, dense_reference, flat
from zoo import ZOO


def test_least_squares_by_hand():
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    r = dense_reference([theta], lambda: [x @ theta], lambda z: F.mse_loss(z, torch.zeros_like(z), reduction="sum"))
    assert_close(r.loss, torch.tensor(10.0))
    assert_close(r.jacobian, x)
    assert_close(r.gradient, torch.tensor([8.0, 6.0]))
    assert_close(r.gauss_newton, torch.tensor([[4.0, 2.0], [2.0, 2.0]]))


def test_softmax_by_hand():
    z = torch.tensor([[0.1, -0.4, 0.7]], dtype=torch.float64, requires_grad=True)
    p = z.detach().softmax(1)[0]
    r = dense_reference([z], lambda: [1.0 * z], lambda y: F.cross_entropy(y, torch.tensor([1])))
    assert_close(r.gauss_newton, p.diag() - p.outer(p))
    assert_close(r.gradient, p - torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("name", ["mlp", "cnn-batchnorm-dropout", "gpt", "physics-informed", "two-marked-outputs"])
def test_gradient_and_gauss_newton_by_finite_differences(name):
    """f(θ + hv) for the gradient; ½uᵀBu with u = (z(θ + hv) − z(θ − hv)) / 2h for vᵀGv."""
    p = ZOO[name](torch.float64)
    r = dense_reference(p.params, p.outputs, p.loss)
    v = torch.randn(len(r.gradient), dtype=torch.float64)
    h = 1e-6
    sides = []
    for step in (h, -h):
        _move(p.params, step * v)
        torch.manual_seed(0)
        z = flat(p.outputs())
        torch.manual_seed(0)
        sides.append((z, p.closure().detach()))
        _move(p.params, -step * v)
    u = (sides[0][0] - sides[1][0]) / (2 * h)
    assert_close((sides[0][1] - sides[1][1]) / (2 * h), r.gradient @ v, 1e-6)
    assert_close(u @ r.output_hessian @ u, v @ r.gauss_newton @ v, 1e-6)


@torch.no_grad()
def _move(params: list[torch.Tensor], step: torch.Tensor) -> None:
    for p, part in zip(params, step.split([p.numel() for p in params]), strict=True):
        p += part.view_as(p)
