"""Jv through layer normalization: exact, and without the second derivatives that a Jacobian has no use for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, flat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchnewton as tn
from torchnewton.record.graph import walk


class Twice(nn.Module):
    """One normalization in two places, the second by hand in the middle of a batch of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.norm(x)))
        return F.layer_norm(self.inner(x).unflatten(1, (2, 2)), (2, 2), eps=0.1).flatten(1)


class Slope(nn.Module):
    """A derivative in the input, as in the loss of a physics-informed network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.body(x).sum(), x, create_graph=True)
        return slope


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return found


class ByVmap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.func.vmap(self.body)(x)
        return found


NETWORKS = {
    "weight and bias": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "without bias": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, bias=False), nn.Tanh()),
    "neither": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)),
    "of the data": lambda: nn.Sequential(nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)),
    "twice": lambda: nn.Sequential(nn.Linear(3, 4), Twice()),
    "slope": Slope,
    "checkpointed": Checkpointed,
    "vmap": ByVmap,
}
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def recorded(name: str) -> tuple[nn.Module, tn.Tape]:
    torch.manual_seed(1)
    model = NETWORKS[name]().double()
    for p in model.parameters():
        nn.init.normal_(p)
    z = torch.zeros_like(model(X))
    return model, tn.record(lambda: F.mse_loss(model(X), z), list(model.parameters()))


@pytest.mark.parametrize("name", NETWORKS)
def test_products_agree_with_a_derivative_of_the_network(name):
    model, tape = recorded(name)
    names, values = zip(*model.named_parameters(), strict=True)
    v = tuple(torch.randn_like(p) for p in values)

    def outputs(*changed: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, changed, strict=True)), (X,))

    _, expected = torch.autograd.functional.jvp(outputs, tuple(p.detach() for p in values), v)
    (found,) = tn.Jacobian(tape).apply(v)
    assert_close(found, expected)


@pytest.mark.parametrize("frozen", ["1.weight", "1.bias", "0.weight"])
def test_frozen_parameters(frozen):
    model = NETWORKS["weight and bias"]().double()
    model.get_parameter(frozen).requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    tape = tn.record(lambda: F.mse_loss(model(X), X[:, :2]), params)
    v, u = [torch.randn_like(p) for p in params], torch.randn(5, 2, dtype=torch.float64)
    J = tn.Jacobian(tape)
    assert_close((J.apply(v)[0] * u).sum(), flat(v) @ flat(J.adjoint([u])))


def test_the_hessian_keeps_the_second_derivatives():
    """Its own graph of the gradient is not touched, also where the linearization was there before."""
    model, tape = recorded("twice")
    names, values = zip(*model.named_parameters(), strict=True)
    v = [torch.randn_like(p) for p in values]
    tn.GaussNewton(tape, tn.Jacobian(tape)) @ v

    def loss(*changed: Tensor) -> Tensor:
        z = torch.func.functional_call(model, dict(zip(names, changed, strict=True)), (X,))
        return z.square().mean()

    _, expected = torch.autograd.functional.hvp(loss, tuple(p.detach() for p in values), tuple(v))
    assert_close(flat(tn.Hessian(tape) @ v), flat(expected))


@pytest.mark.parametrize("name", ["weight and bias", "neither", "twice", "checkpointed"])
def test_no_second_derivative_of_the_normalization_is_in_the_graph(name):
    """It takes five times as long as the transpose, and autograd computes all of it whatever is asked for."""
    _, tape = recorded(name)
    for term in tape.terms:
        term._linearized()
    edges = [row[0] for term in tape.terms for row in term._rows if row is not None]
    assert edges
    assert "NativeLayerNormBackwardBackward0" not in {n.name() for n, _ in walk(edges)}
