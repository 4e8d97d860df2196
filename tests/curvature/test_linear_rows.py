"""The rows of linear networks in float64, against the same rows as a matrix and against dense autograd."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchnewton as tn
from torchnewton.curvature.factor import StoredRows
from torchnewton.curvature.linear_rows import LinearRows


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.first(h), self.second(h)


def mlp(*sizes, bias=True):
    layers = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def problem(kind, dtype=torch.float32):
    torch.manual_seed(0)
    x, y = torch.randn(7, 4).to(dtype), torch.randint(3, (7,))
    if kind == "two heads":
        model = TwoHeads().to(dtype)
        target = torch.randn(7, 2).to(dtype)

        def loss():
            a, b = model(x)
            return F.cross_entropy(a, y) + 0.3 * F.mse_loss(b, target)
    elif kind == "two batches":
        model, more = mlp(4, 6, 3).to(dtype), torch.randn(2, 4).to(dtype)

        def loss():
            return F.cross_entropy(model(x), y) + F.mse_loss(model(more), more[:, :3])
    else:
        model = mlp(4, 6, 3, bias=kind != "no bias").to(dtype)
        if kind == "frozen":
            model[0].weight.requires_grad_(False)
            model[2].bias.requires_grad_(False)

        def loss():
            z = model(x)
            return F.mse_loss(z, x[:, :3]) if kind == "squares" else F.cross_entropy(z, y)

    return loss, [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["classes", "squares", "no bias", "frozen", "two heads", "two batches"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_and_gram_matrix_are_those_of_the_matrix(kind, dtype):
    loss, params = problem(kind, dtype)
    A = tn.GaussNewton(tn.record(loss, params))
    R, _ = A.factored()
    double = R.double()
    assert isinstance(double, StoredRows if kind == "two batches" else LinearRows)
    matrix = R.rows().double()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    v = [torch.randn_like(p) for p in params]
    w = torch.randn(R.num_rows, dtype=torch.float64)
    flat = torch.cat([p.double().flatten() for p in v])
    torch.testing.assert_close(double.product(v), matrix @ flat, **tolerance)
    back = double.adjoint(w)
    assert [b.shape for b in back] == [p.shape for p in params]
    torch.testing.assert_close(torch.cat([b.flatten() for b in back]), matrix.T @ w, **tolerance)
    torch.testing.assert_close(double.gram(torch.float64), matrix @ matrix.T, **tolerance)
    dense = A.to_dense().double()
    torch.testing.assert_close(matrix.T @ matrix, dense, **tolerance)


@pytest.mark.parametrize("kind", ["classes", "squares", "no bias", "frozen"])
def test_its_parts_agree_to_float64_where_the_parameters_are_float32(kind):
    """The residual b − (RᵀR + σ)x may be trusted only where Gram matrix and products are of one R."""
    loss, params = problem(kind)
    double = tn.GaussNewton(tn.record(loss, params)).factored()[0].double()
    units = torch.eye(double.num_rows, dtype=torch.float64)
    gram = torch.stack([double.product(double.adjoint(unit)) for unit in units])
    torch.testing.assert_close(gram, double.gram(torch.float64), rtol=1e-12, atol=1e-14)


def test_shared_weights_and_sequences_go_by_the_matrix():
    torch.manual_seed(0)
    shared, last = nn.Linear(4, 4), nn.Linear(4, 2)
    x = torch.randn(6, 4)
    params = [*shared.parameters(), *last.parameters()]
    tape = tn.record(lambda: F.mse_loss(last(shared(torch.tanh(shared(x)))), x[:, :2]), params)
    assert isinstance(tn.GaussNewton(tape).factored()[0].double(), StoredRows)
    series = torch.randn(6, 3, 4)
    A = tn.GaussNewton(tn.record(lambda: F.mse_loss(last(torch.tanh(shared(series))), series[..., :2]), params))
    assert isinstance(A.factored()[0].double(), StoredRows)


def test_nothing_is_doubled_where_it_is_dear(monkeypatch):
    monkeypatch.setattr("torchnewton.curvature.factor.SMALL_BLOCKS", 0.0)
    loss, params = problem("classes")
    assert tn.GaussNewton(tn.record(loss, params)).factored()[0].double() is None


def test_a_dual_step_with_a_tiny_damping_is_exact_in_single_precision():
    loss, params = problem("squares")
    tape = tn.record(loss, params)
    b = [-g for g in tape.gradient]
    found = tn.Dual().solve(tn.GaussNewton(tape) + 1e-7, b)
    loss, params = problem("squares", torch.float64)
    exact = tn.GaussNewton(tn.record(loss, params)).to_dense()
    assert found.status is tn.Status.CONVERGED
    flat = torch.cat([x.flatten() for x in found.solution]).double()
    right = torch.cat([x.flatten() for x in b]).double()
    residual = exact @ flat + 1e-7 * flat - right
    assert residual.norm() <= 1e-4 * right.norm()


@pytest.mark.parametrize("make", [tn.GaussNewton, tn.EmpiricalFisher])
def test_matrices_of_a_float32_network_are_summed_in_float64(make):
    torch.manual_seed(0)
    model, x = mlp(3, 4, 1), torch.randn(4000, 3)
    A = make(tn.record(lambda: F.mse_loss(model(x), x[:, :1]), list(model.parameters())))
    R = A.factored()[0].rows(torch.float64)
    assert (A.to_dense() - R.T @ R).norm() <= 1e-12 * R.norm() ** 2
