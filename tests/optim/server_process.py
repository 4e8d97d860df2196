"""What the tests of the parameter server run in processes: `serve` or `work`, told by a JSON file."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from methods import make_batch
from torch import nn

import torchnewton as tn


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch_of(worker, step):
    """Batches by worker and step, so that a run can be repeated in another process."""
    x, y = make_batch(1000 * int(worker[1:]) + step)
    return x.double(), y


class Logged(tn.DCASGD):
    """Keeps the order in which workers came."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log = []

    def send(self, worker):
        self.log.append(["send", worker])
        return super().send(worker)

    def receive(self, worker, gradient):
        self.log.append(["receive", worker])
        return super().receive(worker, gradient)


def serve(task, folder):
    model = make_model()
    optimizer = Logged(model.parameters(), **task["optimizer"])
    server = tn.ParameterServer(optimizer, task["address"], checkpoint=folder / "server.pt", checkpoint_every=5)
    with server:
        reached = server.wait(task["updates"], timeout=40)
        time.sleep(task.get("linger", 0))
    result = {
        "reached": reached,
        "log": optimizer.log,
        "updates": server.updates_of,
        "dropped": server.dropped,
        "params": [p.detach().tolist() for p in model.parameters()],
    }
    (folder / "served.json").write_text(json.dumps(result))


def work(task, folder):
    name, model = task["name"], make_model()
    statuses = []
    while "after" in task and not (folder / task["after"]).exists():
        time.sleep(0.02)
    with tn.ServerConnection(task["address"], name, timeout=30) as server:
        optimizer = tn.DCASGDWorker(model.parameters(), server)
        for step in range(task["steps"]):
            x, y = batch_of(name, step)

            def closure(x=x, y=y, step=step):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y) * (math.nan if step == task.get("nan_at") else 1.0)
                loss.backward()
                return loss

            optimizer.step(closure)
            statuses.append(optimizer.report.status)
            if step == task.get("die_at"):
                (folder / "death").touch()
                os._exit(7)
            time.sleep(task.get("pause", 0))
    (folder / f"{name}.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    task_file = Path(sys.argv[2])
    {"serve": serve, "work": work}[sys.argv[1]](json.loads(task_file.read_text()), task_file.parent)
