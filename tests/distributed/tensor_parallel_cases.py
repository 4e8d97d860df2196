"""What the ranks do for `test_tensor_parallel`: layers cut over the ranks, the same samples on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from data_parallel_cases import closure_of, make_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torchnewton as tn

STEPS = 10
CG = tn.CG(rtol=1e-2, max_iterations=10)
METHODS: dict[str, Callable[..., tn.Newton]] = {
    "newton": partial(tn.Newton, solver=CG, damping=tn.LevenbergMarquardt(initial=0.1), weight_decay=1e-3),
    "sgn": partial(tn.SGN, damping=0.1, min_damping=1e-2, max_iterations=5, momentum=0.3),
    "newton-krylov": tn.NewtonKrylov,
    "hessian-free": partial(tn.HessianFree, damping=10.0),
}


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(make: Callable[..., tn.Newton], model: nn.Module) -> tuple[Tensor, list[Any]]:
    """Parameters after ten steps, and (loss, iterations) of every step."""
    optimizer = make(model.parameters())
    found = []
    for step in range(STEPS):
        optimizer.step(closure_of(model, *make_batch(step)))
        found.append((optimizer.report.loss, optimizer.report.inner_iterations))
    with torch.no_grad():
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole]), found


def on_layers_cut(rank: int, size: int) -> Any:
    mesh = init_device_mesh("cpu", (size,))
    found = {}
    for name, make in METHODS.items():
        model = make_model()
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        kinds = [type(p).__name__ for p in model.parameters()]
        found[name] = (*train(make, model), kinds)
    return found


def on_samples_cut_too(rank: int, size: int) -> Any:
    model = make_model()
    parallelize_module(model, init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    tn.Newton(model.parameters(), process_group=tn.DataParallel()).step(closure_of(model, *make_batch()))


def on_default(rank: int, size: int) -> Any:
    """The flagship without arguments, which finds its solver."""
    model = make_model()
    parallelize_module(model, init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = tn.Newton(model.parameters())
    losses = []
    for _ in range(4):
        optimizer.step(closure_of(model, *make_batch()))
        losses.append(optimizer.report.loss)
    return losses, optimizer.report.solver
