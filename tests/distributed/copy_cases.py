"""What the ranks do for `test_copies`: copies of optimizers, ranks that start apart, noise and failures in common."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data_parallel_cases import flat
from failure_cases import make_batch, make_model, parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchnewton as tn
from torchnewton import vectors


def closure_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


METHODS: dict[str, Callable[..., Any]] = {
    "newton": lambda params: tn.Newton(params, process_group=parallel()),
    "secant": lambda params: tn.WorkerSecant(params, process_group=dist.group.WORLD, past_rounds=2),
}


def on_copies(rank: int, size: int) -> Any:
    """A copied optimizer goes on as the original; why none can be pickled."""
    found = {}
    for name, make in METHODS.items():
        model = make_model()
        optimizer = make(model.parameters())
        optimizer.step(closure_of(model, *make_batch(rank)))
        model_too, copied = copy.deepcopy((model, optimizer))
        for trained, stepped in ((model, optimizer), (model_too, copied)):
            stepped.step(closure_of(trained, *make_batch(rank, 1)))
        try:
            message = str(pickle.dumps(optimizer))
        except TypeError as error:
            message = str(error)
        found[name] = torch.equal(flat(model), flat(model_too)), message
    return found


def on_other_starts(rank: int, size: int) -> Any:
    """Two entries change places on rank 1."""
    found = []
    for make in METHODS.values():
        model = make_model()
        if rank == 1:
            weight = model[0].weight.data
            weight[:2, 0] = weight[:2, 0].flip(0)
        try:
            make(model.parameters()).step(closure_of(model, *make_batch(rank)))
        except ValueError as error:
            found.append(str(error))
    return found


def on_noise(rank: int, size: int) -> Any:
    """Entropy-SGD where ranks have seeds of their own."""
    torch.manual_seed(5 + rank)
    model = make_model()
    torch.manual_seed(5 + rank)
    optimizer = tn.EntropySGD(model.parameters(), inner_steps=3, noise=0.1)
    called = DistributedDataParallel(model)
    for step in range(2):
        optimizer.step(closure_of(called, *make_batch(rank, step)))
    return flat(model)


def on_failed_chain(rank: int, size: int) -> Any:
    """Parameters in parts; in one call the loss of rank 1 alone is not a number."""
    model = tn.shard(make_model())
    optimizer = tn.EntropySGD(model.parameters(), inner_steps=3)
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        loss = closure_of(model, *make_batch(rank))()
        return loss * math.nan if rank == 1 and calls[0] == 2 else loss

    before = vectors.flatten([p.detach() for p in model.parameters()])
    optimizer.step(closure)
    status, same = optimizer.report.status, vectors.flatten([p.detach() for p in model.parameters()])
    optimizer.step(closure)
    after = vectors.flatten([p.detach() for p in model.parameters()])
    return status, torch.equal(before, same), optimizer.report.accepted, after
