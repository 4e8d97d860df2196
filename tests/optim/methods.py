"""The optimizers that every guarantee is tested on, and a small task with BatchNorm and dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn

BACKTRACKING = tn.Armijo(decrease=0.9, max_halvings=3, accept_last=True)

NOISE = tn.LevenbergMarquardt(minimum=1e-3, unit=tn.Unit.NOISE)

METHODS: dict[str, Callable[..., tn.Newton]] = {
    "newton": tn.Newton,
    "newton-cg": partial(tn.Newton, solver=tn.CG(max_iterations=5), momentum=0.3),
    "newton-direct": partial(tn.Newton, solver=tn.Direct(), weight_decay=1e-3),
    "newton-backtracking": partial(tn.Newton, line_search=BACKTRACKING),
    "newton-plane": lambda params: tn.Newton(params, solver=tn.Plane(), preconditioner=tn.KFAC(), damping=NOISE),
    "newton-krylov": tn.NewtonKrylov,
    "newton-krylov-halves": partial(tn.NewtonKrylov, disagreement=1.0),
    "published-newton-cg": tn.NewtonCG,
    "hessian-free": tn.HessianFree,
    "martens": partial(tn.HessianFree, curvature=tn.GaussNewton),
    "sgn": tn.SGN,
    "sgn-momentum": partial(tn.SGN, momentum=0.5, preconditioner_exponent=0.75, max_iterations=3),
}

LONG_RUNS = ("newton", "newton-plane", "newton-cg", "newton-direct", "sgn-momentum")


def is_more_careful(now: tn.StepReport, before: tn.StepReport) -> bool:
    """After a failure λ is raised, or the trust radius reduced."""
    return now.damping > before.damping or now.radius < before.radius


def make_model() -> nn.Module:
    """4 → 6 → 3 with BatchNorm and dropout, always the same."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """Sixteen samples of three separable classes, others in every step."""
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(3, (16,), generator=generator)
    return torch.randn(16, 4, generator=generator) + 2 * F.one_hot(y, 4), y


def make_closure(model: nn.Module, step: int) -> Callable[[], Tensor]:
    """As for LBFGS."""
    x, y = make_batch(step)

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: tn.Newton, first: int, last: int) -> list[float]:
    """The steps from `first` up to, not including, `last`; returns their losses."""
    return [float(optimizer.step(make_closure(model, step))) for step in range(first, last)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that are not the same bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]
