"""What the tests run in a process of its own: `resume CHECKPOINT RESULT`, or `memory RESULT`."""

from __future__ import annotations

import gc
import json
import resource
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from methods import LONG_RUNS, METHODS, make_model, train
from torch import nn


def resume(checkpoint: str, result: str) -> None:
    """Five more steps of every method from its checkpoint."""
    finished = {}
    for name, saved in torch.load(checkpoint).items():
        model = make_model()
        optimizer = METHODS[name](model.parameters())
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        losses = train(model, optimizer, 5, 10)
        finished[name] = {"model": model.state_dict(), "losses": losses, "damping": optimizer.report.damping}
    torch.save(finished, result)


def _loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def memory(result: str) -> None:
    """Live tensors and peak memory after 50 and after 300 steps."""
    counts = {}
    for name in LONG_RUNS:
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = METHODS[name](model.parameters())
        x, y = torch.randn(256, 8), torch.randint(4, (256,))
        counts[name] = []
        closure = partial(_loss, model, x, y)
        for step in range(1, 301):
            optimizer.step(closure)
            if step in (50, 300):
                counts[name].append((_live_tensors(), _peak_bytes()))
    Path(result).write_text(json.dumps(counts))


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    {"resume": resume, "memory": memory}[sys.argv[1]](*sys.argv[2:])
