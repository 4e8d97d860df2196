"""One rank of WorkerSecant: `RANK SIZE FOLDER`; batches by worker and call, so that one process can repeat the run."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from methods import make_batch
from torch import distributed, nn

import torchnewton as tn

SETTINGS = {"lr": 0.1, "rest_lr": 0.05, "local_steps": 2, "past_rounds": 1, "weight_decay": 0.01}
FORMS = ("multi-secant", "symmetric")
ROUNDS = 4


def make_model():
    """With BatchNorm, whose buffers are averaged; 67 parameters, which no number of ranks here divides."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 1)).double()


def closure_of(model, worker, calls, nan_at=None):
    """Call number k of a worker sees its own batch; its loss is NaN at `nan_at`."""

    def closure():
        k = calls[worker]
        calls[worker] += 1
        x, y = make_batch(1000 * worker + k)
        model.zero_grad()
        loss = F.mse_loss(model(x.double())[:, 0], y.double()) * (math.nan if k == nan_at else 1.0)
        loss.backward()
        return loss

    return closure


def main(rank, size, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    ends = {}
    for form in FORMS:
        model = make_model()
        group = distributed.group.WORLD if form == FORMS[0] else None  # none is the default group
        optimizer = tn.WorkerSecant(model.parameters(), form=form, process_group=group, **SETTINGS)
        closure = closure_of(model, rank, [0] * size, nan_at=4 if rank == 1 else None)
        reports = []
        for _ in range(ROUNDS):
            loss = optimizer.step(closure)
            reports.append((float(loss), optimizer.report.status, optimizer.report.bytes_communicated))
        ends[form] = {"model": model.state_dict(), "reports": reports}
    try:
        tn.WorkerSecant(model.parameters(), num_workers=size + 1, process_group=distributed.group.WORLD)
    except ValueError as error:
        ends["error"] = str(error)
    torch.save(ends, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
