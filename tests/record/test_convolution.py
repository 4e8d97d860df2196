"""Jv through convolutions: exact, and without the second derivatives that a Jacobian has no use for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, flat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchnewton as tn
from torchnewton.record.graph import walk


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return found


class Slope(nn.Module):
    """A derivative in the input, as in the loss of a physics-informed network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.body(x).sum(), x, create_graph=True)
        return slope


class OfItself(nn.Module):
    """The kernel depends on the parameters by way of the input, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Conv2d(2, 4, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return F.conv2d(h, h.mean((0, 2, 3)).view(1, 4, 1, 1) * self.scale.view(3, 1, 1, 1), self.scale)


IMAGES = (3, 2, 6, 5)
NETWORKS = {
    "plain": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2)), IMAGES),
    "without bias": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False)), IMAGES),
    "stride, padding, dilation, groups": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=(2, 1)), nn.Tanh(), nn.Conv2d(4, 2, 2, dilation=(2, 1), groups=2)
        ),
        IMAGES,
    ),
    "same": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh(), nn.Conv2d(3, 2, 2)), IMAGES),
    "circular": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv2d(3, 2, 2)),
        IMAGES,
    ),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 2)), (3, 2, 7)),
    "three dimensions": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 1, 2)), (2, 1, 4, 3, 3)),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1, groups=2, dilation=2)
        ),
        IMAGES,
    ),
    "checkpointed": (Checkpointed, IMAGES),
    "slope": (Slope, IMAGES),
    "kernel of the input": (OfItself, IMAGES),
}
BY_AUTOGRAD = {
    "same, on one side": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2, padding="same"), nn.Tanh(), nn.Conv2d(3, 2, 2, padding="same")),
        IMAGES,
    ),
    "without a batch": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2)), (2, 6, 5)),
}


def recorded(make, shape):
    torch.manual_seed(1)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    z = torch.zeros_like(model(x))
    return model, x, tn.record(lambda: F.mse_loss(model(x), z), list(model.parameters()))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
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
    model = NETWORKS["plain"][0]().double().requires_grad_(False)
    params = [model.get_parameter(name).requires_grad_() for name in trained]
    x = torch.randn(IMAGES, dtype=torch.float64)
    tape = tn.record(lambda: F.mse_loss(z := model(x), torch.zeros_like(z)), params)
    v, u = [torch.randn_like(p) for p in params], torch.randn_like(tape.outputs[0])
    J = tn.Jacobian(tape)
    assert_close((J.apply(v)[0] * u).sum(), flat(v) @ flat(J.adjoint([u])))


def test_the_hessian_keeps_the_second_derivatives():
    """Its own graph of the gradient is not touched, also where the linearization was there before."""
    model, x, tape = recorded(*NETWORKS["plain"])
    names, values = zip(*model.named_parameters(), strict=True)
    v = [torch.randn_like(p) for p in values]
    tn.GaussNewton(tape, tn.Jacobian(tape)) @ v

    def loss(*changed: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, changed, strict=True)), (x,)).square().mean()

    _, expected = torch.autograd.functional.hvp(loss, tuple(p.detach() for p in values), tuple(v))
    assert_close(flat(tn.Hessian(tape) @ v), flat(expected))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "slope"])
def test_no_second_derivative_of_a_convolution_is_in_the_graph(name):
    """It makes four convolutions in the place of two, and autograd makes all of them whatever is asked for."""
    *_, tape = recorded(*NETWORKS[name])
    for term in tape.terms:
        term._linearized()
    edges = [row.edge for term in tape.terms for row in term._rows if row is not None]
    assert edges
    assert "ConvolutionBackwardBackward0" not in {n.name() for n, _ in walk(edges)}
