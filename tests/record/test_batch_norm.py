"""Jv through batch normalization: exact, and without the second derivatives that a Jacobian has no use for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, flat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchnewton as tn
from torchnewton.record.graph import walk


class Shifted(nn.Module):
    """What comes in has a derivative that is spread over the samples without being copied."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.norm = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(x.cos() * self.shift.exp() + self.shift)
        return found


class Shared(nn.Module):
    """One normalization in two places, so that its statistics move twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(torch.tanh(self.norm(x)))
        return found


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return found


class OfItself(nn.Module):
    """Scale and shift depend on the parameters by way of the input, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return F.batch_norm(h, None, None, h.mean(0).exp(), h.sum(0), training=True)


TABLE, IMAGES = (6, 3), (3, 2, 4, 3)
NETWORKS = {
    "weight and bias": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), TABLE),
    "neither": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh()), TABLE),
    "no statistics": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), TABLE),
    "of the data": (lambda: nn.Sequential(nn.BatchNorm1d(3, eps=0.1), nn.Tanh(), nn.Linear(3, 2)), TABLE),
    "on sequences": (lambda: nn.Sequential(nn.Conv1d(3, 2, 2), nn.BatchNorm1d(2), nn.Tanh()), (4, 3, 5)),
    "images": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 2)), IMAGES),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh()), (3, 1, 3, 3, 2)),
    "average momentum": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None)), TABLE),
    "shifted": (Shifted, TABLE),
    "shared": (Shared, TABLE),
    "checkpointed": (Checkpointed, TABLE),
    "scale of the input": (OfItself, TABLE),
}
MODES = ["training", "eval"]


def made(name: str, mode: str, format: torch.memory_format = torch.contiguous_format) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[name]
    torch.manual_seed(1)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    for p in model.parameters():
        nn.init.normal_(p)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0)
    return model.train(mode == "training").to(memory_format=format), x.contiguous(memory_format=format)


def recorded(model: nn.Module, x: Tensor) -> tn.Tape:
    return tn.record(lambda: F.mse_loss(z := model(x), torch.zeros_like(z)), list(model.parameters()))


def outputs_of(model: nn.Module, x: Tensor):
    """z as a function of the parameters, which leaves the buffers alone."""
    model = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]

    def outputs(*changed: Tensor) -> Tensor:
        return torch.func.functional_call(copy.deepcopy(model), dict(zip(names, changed, strict=True)), (x,))

    return outputs, tuple(p.detach() for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_products_agree_with_a_derivative_of_the_network(name, mode):
    model, x = made(name, mode)
    outputs, values = outputs_of(model, x)
    v = tuple(torch.randn_like(p) for p in values)
    _, expected = torch.autograd.functional.jvp(outputs, values, v)
    tape = recorded(model, x)
    (found,) = tn.Jacobian(tape).apply(v)
    assert_close(found, expected)
    assert_close(tn.Jacobian(tape).apply(v)[0], found)  # nothing that it is made of moves


@pytest.mark.parametrize("mode", MODES)
def test_channels_last(mode):
    model, x = made("images", mode, torch.channels_last)
    outputs, values = outputs_of(model, x)
    v = tuple(torch.randn_like(p) for p in values)
    _, expected = torch.autograd.functional.jvp(outputs, values, v)
    assert_close(tn.Jacobian(recorded(model, x)).apply(v)[0], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trained", [["1.weight"], ["1.bias"], ["0.weight"], ["0.bias", "1.weight"]])
def test_frozen_parameters(trained, mode):
    model, x = made("weight and bias", mode)
    model.requires_grad_(False)
    params = [model.get_parameter(name).requires_grad_() for name in trained]
    tape = tn.record(lambda: F.mse_loss(z := model(x), torch.zeros_like(z)), params)
    v, u = [torch.randn_like(p) for p in params], torch.randn_like(tape.outputs[0])
    J = tn.Jacobian(tape)
    assert_close((J.apply(v)[0] * u).sum(), flat(v) @ flat(J.adjoint([u])))


@pytest.mark.parametrize("mode", MODES)
def test_the_hessian_keeps_the_second_derivatives(mode):
    """Its own graph of the gradient is not touched, also where the linearization was there before."""
    model, x = made("images", mode)
    outputs, values = outputs_of(model, x)
    v = tuple(torch.randn_like(p) for p in values)
    _, expected = torch.autograd.functional.hvp(lambda *p: outputs(*p).square().mean(), values, v)
    tape = recorded(model, x)
    tn.GaussNewton(tape, tn.Jacobian(tape)) @ list(v)
    assert_close(flat(tn.Hessian(tape) @ list(v)), flat(expected))


@pytest.mark.parametrize("name", ["weight and bias", "shared", "average momentum"])
def test_statistics_move_once_as_in_an_ordinary_run_and_are_put_back_in_replays(name):
    model, x = made(name, "training")
    other = copy.deepcopy(model)
    F.mse_loss(z := other(x), torch.zeros_like(z)).backward()
    tape = recorded(model, x)
    v = [torch.randn_like(p) for p in model.parameters()]
    for work in (
        lambda: None,
        lambda: tn.GaussNewton(tape, tn.Jacobian(tape)) @ v,
        lambda: tn.GaussNewton(tape, tn.DifferenceJacobian(tape)).quadratic_form([v]),
        tape.evaluate,
    ):
        work()
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["weight and bias", "neither", "images", "shared", "checkpointed"])
def test_no_second_derivative_of_the_normalization_is_in_the_graph(name, mode):
    """It takes five times as long as the transpose, and autograd computes all of it whatever is asked for."""
    model, x = made(name, mode)
    edges = []
    for term in recorded(model, x).terms:
        term._linearized()
        edges += [row[0] for row in term._rows if row is not None]
    assert edges
    assert "NativeBatchNormBackwardBackward0" not in {n.name() for n, _ in walk(edges)}
