"""What the ranks do for `test_shard`: parameters in parts, every rank with its own samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from data_parallel_cases import METHODS as DATA_PARALLEL
from data_parallel_cases import make_batch, part, plane
from torch import Tensor, nn

import torchnewton as tn

STEPS = 10
METHODS: dict[str, Callable[..., tn.Newton]] = {
    **DATA_PARALLEL,
    "decays": lambda params: tn.Newton(groups(params), solver=tn.CG(rtol=1e-2, max_iterations=10), momentum=0.2),
    "preconditioned": partial(tn.SGN, preconditioner_exponent=0.5, damping=1e-2, max_iterations=4),
    "complex": partial(tn.NewtonKrylov, curvature=tn.ComplexStepHessian.of),
}


class Net(nn.Module):
    """Sizes that no number of ranks divides, a scalar, a weight used twice and once more in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.again = nn.Linear(7, 7)
        self.again.weight = self.middle.weight
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.register_buffer("offset", torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.middle(torch.tanh(self.middle(h))))
        return self.last(torch.tanh(self.again(h))) * self.scale + self.offset


def groups(params: Any) -> list[dict[str, Any]]:
    params = list(params)
    return [{"params": params[:3], "weight_decay": 1e-2}, {"params": params[3:], "weight_decay": 0.0}]


def make_model(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return Net().double()


def closure_of(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), F.one_hot(y, 3).double(), reduction=reduction)
        loss.backward()
        return loss

    return closure


def whole_of(model: nn.Module) -> Tensor:
    return torch.cat([tn.vectors.flatten([p.detach()]) for p in model.parameters()])


def train(
    make: Callable[..., tn.Newton],
    share: Callable[..., Any],
    cut: bool,
    steps: int = STEPS,
    subset: bool = False,
    reduction: str = "mean",
) -> tuple[Tensor, list[Any]]:
    """Parameters after some steps with a new batch each, and (loss, λ, iterations) of every step."""
    model = make_model()
    if cut:
        tn.shard(model)
    optimizer = make(model.parameters())
    found = []
    for step in range(steps):
        closure = closure_of(model, *share(make_batch(step)), reduction)
        other = closure_of(model, *share(make_batch(100 + step)), reduction) if subset else None
        optimizer.step(closure, curvature=other)
        report = optimizer.report
        found.append((report.loss, report.damping, report.inner_iterations, report.accepted))
    return whole_of(model), found


def whole(name: str, **how: Any) -> tuple[Tensor, list[Any]]:
    """One process."""
    return train(METHODS[name], lambda batch: batch, False, **how)


def on_methods(rank: int, size: int) -> dict[str, Any]:
    share = partial(part, rank=rank, size=size)
    names = METHODS if size == 4 else ("newton", "cg", "sgn", "newton-krylov", "hessian-free", "newton-cg")
    return {name: train(METHODS[name], share, True) for name in names}


def on_uneven(rank: int, size: int) -> Any:
    return train(METHODS["cg"], partial(part, rank=rank, size=size, uneven=True), True)
