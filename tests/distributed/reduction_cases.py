"""What the ranks do for `test_reductions`: losses whose reduction is not what they are called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from data_parallel_cases import flat, refusal
from failure_cases import make_model, parallel
from torch import Tensor, nn

import torchnewton as tn

LENGTHS = (12, 28)
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def make_batch(rank: int | None = None) -> tuple[Tensor, Tensor]:
    """That of a rank, or of all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(LENGTHS), 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (len(x),), generator=generator)
    return (x, y) if rank is None else (x.split(LENGTHS)[rank], y.split(LENGTHS)[rank])


def squares(reduction: str, z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, F.one_hot(y, 3).double(), reduction=reduction)


def masked(z: Tensor, y: Tensor) -> Tensor:
    kept = (y > 0).double()
    return (F.cross_entropy(z, y, reduction="none") * kept).sum() / kept.sum()


LOSSES: dict[str, Loss] = {
    "sum over the length": lambda m, x, y: squares("sum", m(x), y) / len(x),
    "half a sum over the length": lambda m, x, y: squares("sum", m(x), y) / (2 * len(x)),
    "sum over the entries": lambda m, x, y: squares("sum", m(x), y) / m(x).numel(),
    "half a sum": lambda m, x, y: 0.5 * squares("sum", m(x), y),
    "a sum with a factor": lambda m, x, y: 0.3 * squares("sum", m(x), y),
    "entries, summed": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").sum(),
    "entries, averaged": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").mean(),
    "entries, averaged over the masked": lambda m, x, y: masked(m(x), y),
    "rows, averaged": lambda m, x, y: squares("none", m(x), y).sum(1).mean(),
    "two means": lambda m, x, y: F.cross_entropy(m(x), y) + 0.1 * squares("none", m(x), y).mean(),
}
MIXED: dict[str, Loss] = {
    "mean and sum": lambda m, x, y: F.cross_entropy(m(x), y) + squares("sum", m(x), y),
    "unknown factor": lambda m, x, y: 7 * F.cross_entropy(m(x), y, reduction="none").sum(),
}


def steps(loss: Loss, rank: int | None, **how: Any) -> tuple[Tensor, float]:
    model = make_model()
    optimizer = tn.NewtonCG(model.parameters(), weight_decay=0.1, **how)
    for _ in range(2):
        optimizer.step(partial(loss, model, *make_batch(rank)))
    return flat(model), optimizer.report.loss


def on_losses(rank: int, size: int) -> Any:
    return {name: steps(loss, rank, process_group=parallel()) for name, loss in LOSSES.items()}


def on_mixed_losses(rank: int, size: int) -> Any:
    """Refused, also where one rank alone has them; taken with an argument."""
    found = {}
    for name, loss in MIXED.items():
        of_rank = [loss, loss if rank else LOSSES["entries, averaged"]]
        found[name] = [refusal(partial(steps, each, rank, process_group=parallel())) for each in of_rank]
    summed = tn.DataParallel(summed=True)
    return found, steps(MIXED["unknown factor"], rank, process_group=summed)


def on_one_sample(rank: int, size: int) -> Any:
    """A rank with one sample does as the others do."""
    found = {}
    for name in ("sum over the length", "entries, summed", "half a sum"):
        model = make_model()
        optimizer = tn.NewtonCG(model.parameters(), process_group=parallel())
        x, y = make_batch()
        optimizer.step(partial(LOSSES[name], model, *((x[:1], y[:1]) if rank else (x[1:], y[1:]))))
        found[name] = optimizer.report.loss
    return found


def on_counts(rank: int, size: int) -> float:
    """A number of samples of the closure says nothing of those of the curvature."""
    x, y = make_batch(rank)
    k = 9 if rank == 0 else 3

    def theta(group: tn.DataParallel) -> Tensor:
        model = make_model()
        optimizer = tn.NewtonCG(model.parameters(), process_group=group)
        optimizer.step(lambda: F.cross_entropy(model(x), y), curvature=lambda: F.cross_entropy(model(x[:k]), y[:k]))
        return flat(model)

    return float((theta(parallel()) - theta(tn.DataParallel(num_samples=float(len(x))))).norm())
