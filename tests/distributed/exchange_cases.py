"""What the ranks do for `test_exchanges`: two steps in every mode, and what the second one has sent."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data_parallel_cases import part
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import torchnewton as tn
from torchnewton.train.exchanges import MODES, mesh_of

SIZES, SAMPLES, ITERATIONS, MIN_ITERATIONS = (5, 9, 7, 3), 128, 4, 2

DTYPES = (torch.float32, torch.float64)


def make_model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def second_step(mode: str, dtype: torch.dtype, rank: int, size: int) -> tuple[int, int, int]:
    """Bytes, messages, evaluations."""
    model = make_model(dtype)
    x, y = torch.randn(SAMPLES, SIZES[0], dtype=dtype), torch.randint(SIZES[-1], (SAMPLES,))
    how: dict[str, Any] = {"max_iterations": ITERATIONS, "rtol": 0.0}
    if size > 1 and mode != "partitioned":
        how["process_group"] = dist.group.WORLD
        x, y = part((x, y), rank, size)
    if mode == "partitioned":
        model = tn.partition(model, init_device_mesh("cpu", mesh_of(size)))
    if mode in ("diagonalized", "quorum"):
        quorum = tn.Quorum(share=1.0, min_iterations=MIN_ITERATIONS) if mode == "quorum" else None
        make = partial(tn.DistributedNewton, quorum=quorum)
    else:
        make = tn.NewtonCG
    optimizer = make(model.parameters(), **how)

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    for _ in range(2):
        optimizer.step(closure)
        assert optimizer.report.inner_iterations == ITERATIONS
    report = optimizer.report
    return report.bytes_communicated, report.messages, report.loss_evaluations


def on_steps(rank: int, size: int) -> Any:
    return {(mode, dtype): second_step(mode, dtype, rank, size) for mode in MODES for dtype in DTYPES}
