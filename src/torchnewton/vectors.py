"""Arithmetic on vectors: lists of tensors in the order and shapes of the parameters.

The solvers and the step loop use these few functions only, so that one place decides how a vector is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = list[Tensor]
Agreement: TypeAlias = Callable[[Tensor], Tensor]

_AGREEMENT: ContextVar[Agreement | None] = ContextVar("agreement", default=None)


@contextmanager
def agreeing(agreement: Agreement | None) -> Iterator[None]:
    """Let `dot` and `max_abs` inside the block give what `agreement` makes of the number this process has found.

    Processes that hold copies of the same vectors may find numbers that differ by rounding, and would then part ways at
    a comparison: here they come to one number. None is for vectors that concern this process alone.
    """
    token = _AGREEMENT.set(agreement)
    try:
        yield
    finally:
        _AGREEMENT.reset(token)


def is_distributed(x: Tensor) -> bool:
    """Whether x is a DTensor, of which this process may hold a part only."""
    return hasattr(x, "full_tensor")


def _whole(number: Tensor) -> Tensor:
    """A number that is a DTensor, summed over the processes."""
    found: Tensor = number.full_tensor() if is_distributed(number) else number  # type: ignore[attr-defined]
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if is_distributed(a) or is_distributed(b):
        return _whole((a * b).sum())  # a flat view would gather a tensor that is cut along another dimension
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _agreed(number: Tensor) -> float:
    agreement = _AGREEMENT.get()
    return float(number if agreement is None else agreement(number))


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """⟨x, y⟩, summed over all tensors (0 for empty lists)."""
    if not x:
        return 0.0
    return _agreed(torch.stack([_dot(a, b) for a, b in zip(x, y, strict=True)]).sum())


def inner_products(D: Sequence[Sequence[Tensor]], E: Sequence[Sequence[Tensor]]) -> Tensor:
    """DᵀE of two lists of vectors, known to be symmetric: its upper half, mirrored, in float64 on the CPU."""
    found = torch.empty(len(D), len(D), dtype=torch.float64)
    for i, d in enumerate(D):
        for j in range(i, len(D)):
            found[i, j] = found[j, i] = dot(d, E[j])
    return found


def norm(x: Sequence[Tensor]) -> float:
    """‖x‖₂."""
    return math.sqrt(dot(x, x))


def max_abs(x: Sequence[Tensor]) -> float:
    """‖x‖_∞."""
    return _agreed(torch.stack([_whole(a.abs().max()) for a in x if a.numel()]).max())


def add(x: Sequence[Tensor], y: Sequence[Tensor], alpha: float = 1.0) -> Vector:
    """x + αy, as new tensors."""
    return [torch.add(a, b, alpha=alpha) for a, b in zip(x, y, strict=True)]


def add_(x: Sequence[Tensor], y: Sequence[Tensor], alpha: float = 1.0) -> None:
    """x ← x + αy, in place."""
    for a, b in zip(x, y, strict=True):
        a.add_(b, alpha=alpha)


def scale(x: Sequence[Tensor], alpha: float) -> Vector:
    """αx, as new tensors."""
    return [a * alpha for a in x]


def clone(x: Sequence[Tensor]) -> Vector:
    """A copy that shares no memory and no graph."""
    return [a.detach().clone() for a in x]


def zeros_like(x: Sequence[Tensor]) -> Vector:
    """Zeros in the shapes of x."""
    return [torch.zeros_like(a) for a in x]


def is_finite(x: Sequence[Tensor]) -> bool:
    """True when no entry is NaN or infinite: one pass for the sums, a closer look only where one of them is not."""
    return all(math.isfinite(float(_whole(a.sum()))) or bool(_whole(torch.isfinite(a).all())) for a in x)


def num_entries(x: Sequence[Tensor]) -> int:
    """The number of entries of all tensors."""
    return sum(a.numel() for a in x)


def flatten(x: Sequence[Tensor]) -> Tensor:
    """One flat tensor of all entries, in order."""
    return torch.cat([a.reshape(-1) for a in x])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> Vector:
    """Cut a flat tensor into the shapes of `like`."""
    parts = flat.split([a.numel() for a in like])
    return [part.view(a.shape) for part, a in zip(parts, like, strict=True)]


def symmetric_product(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """XᵀY, known to be symmetric, as `dtype`: block columns of the lower triangle, mirrored; 9/16 of the work."""
    size = X.shape[1]
    total = torch.empty(size, size, dtype=dtype, device=X.device)
    width = max(96, -(-size // 8))
    for start in range(0, size, width):
        stop = min(start + width, size)
        columns = X[:, start:].mT @ Y[:, start:stop]
        total[start:, start:stop] = columns
        total[start:stop, stop:] = columns[stop - start :].mT
    return total
