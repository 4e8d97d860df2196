"""What the ranks do for `test_train`: the runs of `torchnewton train`, as torchrun starts them."""

from __future__ import annotations

import os
from typing import Any

import torch

from torchnewton.train.loop import train
from torchnewton.train.runs import Settings, make_run

MODES: dict[str, dict[str, Any]] = {
    "exact, all data": {"method": "newton-cg", "batch_size": 150, "subset": 0.3},
    "exact": {"method": "newton-cg", "batch_size": 256, "subset": 1.0},
    "diagonalized": {"method": "distributed-newton", "batch_size": 256},
    "quorum": {"method": "distributed-newton", "batch_size": 256, "quorum": 0.5},
}


def result(name: str) -> dict[str, Any]:
    """Six epochs on digits."""
    settings, run = make_run(Settings(data="digits", model="mlp:8", epochs=6, samples=512, **MODES[name]))
    train(run, settings.budget)
    return {
        "losses": [record.train_loss for record in run.history],
        "parameters": torch.cat([p.detach().reshape(-1) for p in run.model.parameters()]),
        "solver": run.optimizer.report.solver,
        "quorum": getattr(run.optimizer.solver, "quorum", None),
        "ranks": settings.ranks,
    }


def on_modes(rank: int, size: int) -> dict[str, Any]:
    os.environ["TORCHELASTIC_RUN_ID"] = "here"  # as torchrun does
    return {name: result(name) for name in MODES}
