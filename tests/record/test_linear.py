"""Jv through linear layers: exact, and with no addition beside the matrix products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, flat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchnewton as tn
from torchnewton.record import linear
from torchnewton.record.graph import walk


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return found


class Tied(nn.Module):
    """One weight in two places, once transposed, with a bias that a sum over the batch feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.weight))
        return F.linear(h, self.weight.t(), h.sum(0) if h.dim() == 2 else None)


def two_layers(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))


NETWORKS = {
    "a batch": (two_layers, (5, 3)),
    "without bias": (lambda: two_layers(bias=False), (5, 3)),
    "more dimensions": (two_layers, (5, 2, 3)),
    "more dimensions, without bias": (lambda: two_layers(bias=False), (2, 5, 2, 3)),
    "tied": (Tied, (5, 3)),
    "checkpointed": (Checkpointed, (5, 3)),
}
BY_AUTOGRAD = {
    "no batch": (two_layers, (3,)),
    "turned input": (lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), Turned(), *two_layers()), (5, 3)),
}


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, -1, 4).transpose(1, 2)


@pytest.fixture(autouse=True)
def _small_layers_count(monkeypatch):
    monkeypatch.setattr(linear, "SMALLEST", 0)


def recorded(make, shape):
    torch.manual_seed(1)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    for p in model.parameters():
        nn.init.normal_(p)
    z = torch.zeros_like(model(x))
    return model, x, tn.record(lambda: F.mse_loss(model(x), z), list(model.parameters()))


@pytest.mark.parametrize("name", [*NETWORKS, *BY_AUTOGRAD])
def test_products_agree_with_a_derivative_of_the_network(name):
    model, x, tape = recorded(*(NETWORKS | BY_AUTOGRAD)[name])
    names, values = zip(*model.named_parameters(), strict=True)
    v = tuple(torch.randn_like(p) for p in values)

    def outputs(*changed: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, changed, strict=True)), (x,))

    _, expected = torch.autograd.functional.jvp(outputs, tuple(p.detach() for p in values), v)
    (found,) = tn.Jacobian(tape).apply(v)
    assert_close(found, expected)


@pytest.mark.parametrize("trained", [["0.weight"], ["0.bias"], ["2.bias"], ["0.bias", "2.weight"], ["2.weight"]])
def test_frozen_parameters(trained):
    model = two_layers().double().requires_grad_(False)
    params = [model.get_parameter(name).requires_grad_() for name in trained]
    x = torch.randn(5, 3, dtype=torch.float64)
    tape = tn.record(lambda: F.mse_loss(z := model(x), torch.zeros_like(z)), params)
    v, u = [torch.randn_like(p) for p in params], torch.randn_like(tape.outputs[0])
    J = tn.Jacobian(tape)
    assert_close((J.apply(v)[0] * u).sum(), flat(v) @ flat(J.adjoint([u])))


@pytest.mark.parametrize(("smallest", "small"), [(0, False), (100, True)])
def test_autograd_takes_small_layers_alone(monkeypatch, smallest, small):
    monkeypatch.setattr(linear, "SMALLEST", smallest)
    _, _, tape = recorded(*NETWORKS["a batch"])
    for term in tape.terms:
        term._linearized()
    edges = [row.edge for term in tape.terms for row in term._rows if row is not None]
    assert ("MmBackward0" in {n.name() for n, _ in walk(edges)}) == small
