"""Methods by name: an optimizer for a model, its default rate and the rates that `compare` tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchnewton.curvature import ComplexStepHessian
from torchnewton.optim import (
    DCASGD,
    SGN,
    DistributedNewton,
    EntropySGD,
    HessianFree,
    Newton,
    NewtonCG,
    NewtonKrylov,
    WorkerSecant,
)
from torchnewton.train.data import Dataset
from torchnewton.train.errors import UsageError, choose


@dataclass(frozen=True)
class Method:
    """One method: `make(model, lr)` gives the optimizer; without `rates` there is no rate to choose."""

    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    default_lr: float | None = None
    rates: tuple[float, ...] = ()
    batch: Callable[[Dataset], int] = lambda data: 64 if len(data.x_train) < 2000 else 128
    convolutional_batch: Callable[[Dataset], int] | None = None  # where it differs
    epochs: int = 30
    subset: float | None = None  # of the data for the curvature of a step on all data


def make_optimizer(name: str, model: nn.Module, lr: float | None, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """The optimizer of method `name` on `model`; `lr` is for the methods that have a rate.

    Raises:
        UsageError: if the name is unknown or the method has no rate or weight decay to set.
    """
    method = METHODS[choose("method", name, NAMES)]
    if lr is not None and method.default_lr is None:
        with_rate = ", ".join(name for name in NAMES if METHODS[name].rates)
        raise UsageError(f"--lr is for {with_rate}: {name} has no rate to set.")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UsageError("--method muon needs PyTorch 2.9 or newer.")
    optimizer = method.make(model, lr or method.default_lr or 1.0)
    for group in optimizer.param_groups if weight_decay else ():
        if "weight_decay" not in group:
            raise UsageError(f"--C is no option of {name}, which has no weight decay.")
        group["weight_decay"] = weight_decay
    return optimizer


def default_batch_size(name: str, data: Dataset, *, convolutional: bool = False) -> int:
    """The batch a method is usually run with: small for first order, larger for Newton, all for L-BFGS."""
    method = METHODS[choose("method", name, NAMES)]
    batch = method.convolutional_batch if convolutional and method.convolutional_batch else method.batch
    return min(len(data.x_train), batch(data))


def _newton_batch(data: Dataset) -> int:
    """Large enough for a step's fixed cost not to count, small enough for many steps a pass: as measured."""
    n = len(data.x_train)
    if data.kind == "text":
        return 32
    return min(max(n // 40, 64), 500) if data.kind == "classification" else min(max(n // 10, 64), 600)


def _convolutional_newton_batch(data: Dataset) -> int:
    """Smaller: a sample costs so much that a step's fixed cost does not count."""
    return min(max(len(data.x_train) // 240, 64), 250)


def _tenth(data: Dataset) -> int:
    return 64 if data.kind == "text" else min(max(len(data.x_train) // 10, 250), 1000)


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` for the hidden weights, AdamW for all else, at one rate and without weight decay.

    Hidden weights are those with two or more dimensions except embeddings and the output layer, the last one.
    Convolutions go in as matrices of output channels by the rest. Muon's update is scaled to the size of
    AdamW's, so that one rate fits both.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        weights = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
        self._hidden = weights[:-1] or weights
        hidden = {id(p) for p in self._hidden}
        # The flat parameters share memory with the model's.
        self._flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._hidden]
        self._muon = torch.optim.Muon(self._flat, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        others = [p for p in model.parameters() if id(p) not in hidden]
        self._adamw = torch.optim.AdamW(others, lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluates the closure once and updates; returns its loss."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for p, flat in zip(self._hidden, self._flat, strict=True):
            flat.grad = None if p.grad is None else p.grad.view_as(flat)
        self._muon.step()
        self._adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimizers."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])


_ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
METHODS = {
    "newton": Method(
        lambda model, lr: Newton(model.parameters()),
        batch=_newton_batch,
        convolutional_batch=_convolutional_newton_batch,
        epochs=12,
    ),
    "sgn": Method(lambda model, lr: SGN(model.parameters()), batch=_tenth, epochs=12),
    "newton-krylov": Method(lambda model, lr: NewtonKrylov(model.parameters()), batch=_tenth, epochs=12),
    "newton-krylov-complex-step": Method(
        lambda model, lr: NewtonKrylov(model.parameters(), curvature=ComplexStepHessian.of),
        batch=_tenth,
        epochs=12,
    ),
    "newton-cg": Method(
        lambda model, lr: NewtonCG(model.parameters()), batch=lambda data: 1024, epochs=100, subset=0.05
    ),
    "distributed-newton": Method(lambda model, lr: DistributedNewton(model.parameters()), batch=_tenth, epochs=12),
    "hessian-free": Method(lambda model, lr: HessianFree(model.parameters()), batch=_tenth, epochs=12),
    "adam": Method(lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr), 1e-3, _ADAM_RATES),
    "sgd": Method(
        lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        0.03,
        (0.003, 0.01, 0.03, 0.1, 0.3),
    ),
    "lbfgs": Method(
        lambda model, lr: torch.optim.LBFGS(model.parameters(), lr=1.0, line_search_fn="strong_wolfe"),
        batch=lambda data: 10_000,
        epochs=10,
    ),
    "muon": Method(Muon, 3e-3, _ADAM_RATES),
    "dc-asgd": Method(
        lambda model, lr: DCASGD(model.parameters(), lr=lr, adaptive=True, delay=4), 0.01, (0.003, 0.01, 0.03, 0.1, 0.3)
    ),
    "worker-secant": Method(
        lambda model, lr: WorkerSecant(model.parameters(), lr=lr, local_steps=4, num_workers=4),
        0.1,
        (0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "entropy-sgd": Method(
        lambda model, lr: EntropySGD(model.parameters(), inner_lr=lr), 0.01, (0.001, 0.003, 0.01, 0.03, 0.1)
    ),
}
NAMES = list(METHODS)
