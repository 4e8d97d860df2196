"""What the ranks do for `test_checkpoint`: save on four, go on there, on two and on one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from data_parallel_cases import make_batch, part
from shard_cases import CG, FLAT, closure_of, make_model, whole_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import torchnewton as tn
from torchnewton.optim.regime import RegimeChoice

BEFORE, AFTER = 3, 3
Make = Callable[..., torch.optim.Optimizer]


def kfac(params: Any) -> tn.Newton:
    return tn.Newton(params, solver=tn.Plane(), preconditioner=tn.KFAC(), damping=FLAT)


def flagship_in_the_plane(params: Any) -> tn.Newton:
    optimizer = tn.Newton(params)
    optimizer.choice = RegimeChoice(gradients=0.0, flops=0.0)
    return optimizer


NEWTONS: dict[str, Make] = {
    "default": tn.Newton,
    "cg": partial(tn.Newton, solver=CG, damping=FLAT, momentum=0.3, weight_decay=1e-3),
    "krylov": tn.NewtonKrylov,
    "martens": partial(tn.HessianFree, curvature=tn.GaussNewton, max_iterations=4, damping=10.0),
    "sgn": partial(tn.SGN, momentum=0.3, damping=0.1, min_damping=0.1, max_iterations=4),
    "kfac": kfac,
    "plane": flagship_in_the_plane,
}


def frozen_first(model: nn.Module) -> nn.Module:
    next(iter(model.parameters())).requires_grad_(False)
    return model


def build(make: Make, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = frozen_first(make_model())
    if kind == "parts":
        tn.shard(model)
    called = DistributedDataParallel(model) if kind == "copies" else model
    return called, make(called.parameters())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, share: Callable[..., Any]) -> Tensor:
    for step in numbers:
        optimizer.step(closure_of(model, *share(make_batch(step))))
    return whole_of(model)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def folder_of(name: str, kind: str) -> Path:
    """Beside what the ranks give back, see `ranks.py`."""
    return Path(sys.argv[3]).parent / "checkpoints" / f"{name}-{kind}"


def on_saving(rank: int, size: int) -> Any:
    """The steps that follow undisturbed, and the folder."""
    found = {}
    for kind in ("parts", "copies"):
        for name, make in NEWTONS.items():
            share = partial(part, rank=rank, size=size)
            model, optimizer = build(make, kind)
            steps(model, optimizer, range(BEFORE), share)
            folder = folder_of(name, kind)
            save(model, optimizer, folder)
            found[name, kind] = steps(model, optimizer, range(BEFORE, BEFORE + AFTER), share), str(folder)
    return found


def on_going_on(rank: int, size: int) -> Any:
    """From what four ranks have saved: in parts what was in parts, as copies what were copies, and the other way."""
    found = {}
    for kind, stored in (("parts", "parts"), ("copies", "copies"), ("parts", "copies"), ("copies", "parts")):
        for name, make in NEWTONS.items():
            if kind == stored or name == "cg":
                model, optimizer = build(make, kind)
                load(model, optimizer, folder_of(name, stored))
                share = partial(part, rank=rank, size=size)
                found[name, kind, stored] = steps(model, optimizer, range(BEFORE, BEFORE + AFTER), share)
    return found
