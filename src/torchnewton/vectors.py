"""Arithmetic on vectors: lists of tensors in the order and shapes of the parameters.

The solvers and the step loop use these few functions only, so that one place decides how a vector is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = list[Tensor]
Agreement: TypeAlias = Callable[[Tensor], Tensor]


class Exchange(Protocol):
    """Sums and maxima of a number over all processes that hold parts of DTensors."""

    def sum(self, number: Tensor, /) -> Tensor:
        """Σ over the processes."""
        ...

    def max(self, number: Tensor, /) -> Tensor:
        """The largest."""
        ...


_AGREEMENT: ContextVar[Agreement | None] = ContextVar("agreement", default=None)
_EXCHANGE: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


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


@contextmanager
def exchanging(exchange: Exchange) -> Iterator[None]:
    """Let numbers of DTensors inside the block be joined by `exchange`; else each mesh does it."""
    token = _EXCHANGE.set(exchange)
    try:
        yield
    finally:
        _EXCHANGE.reset(token)


def is_distributed(x: Tensor) -> bool:
    """Whether x is a DTensor, of which this process may hold a part only."""
    return hasattr(x, "full_tensor")


def _whole(x: Tensor) -> Tensor:
    """A DTensor as every process has it, a number summed over them; any other tensor as it is."""
    found: Tensor = x.full_tensor() if is_distributed(x) else x  # type: ignore[attr-defined]
    return found


def _dots(x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """Numbers whose sum is ⟨x, y⟩; DTensors that lie alike add up where they are, then over the processes, at once."""
    found, kept = [], []
    for a, b in zip(x, y, strict=True):
        if not (is_distributed(a) or is_distributed(b)):
            found.append(torch.dot(a.reshape(-1), b.reshape(-1)))
        elif _lie_alike(a, b):
            kept.append((a, torch.dot(_local(a).reshape(-1), _local(b).reshape(-1))))
        else:
            found.append(_whole((a * b).sum()))  # a flat view would gather a tensor that is cut in another dimension
    return found + _joined(kept, "sum")


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are DTensors on the same mesh, every entry at the same processes and nothing pending."""
    from torch.distributed.tensor import DTensor

    if not (isinstance(a, DTensor) and isinstance(b, DTensor)):
        return False
    alike = a.device_mesh == b.device_mesh and a.placements == b.placements
    return alike and not any(place.is_partial() for place in a.placements)


def _local(x: Tensor) -> Tensor:
    """What this process has of a DTensor."""
    local: Tensor = x.detach().to_local()  # type: ignore[attr-defined]
    return local


def _joined(parts: Sequence[tuple[Tensor, Tensor]], kind: Literal["sum", "max"]) -> list[Tensor]:
    """For summands, or sizes ≥ 0, found of the local parts of DTensors: their sums or maxima over the processes.

    One message for each mesh, or a single one by `exchanging`. Where several processes have the same part, the first
    one's counts: so all come to the same number bit by bit.
    """
    if not parts:
        return []
    from torch.distributed.tensor import DTensor, Partial

    exchange, found = _EXCHANGE.get(), dict[Any, list[Tensor]]()
    for x, number in parts:
        assert isinstance(x, DTensor)  # for mypy
        place = x.device_mesh.get_coordinate() or [0] * x.device_mesh.ndim
        counts = not any(at and cut.is_replicate() for at, cut in zip(place, x.placements, strict=True))
        key = x.device_mesh if exchange is None else None
        found.setdefault(key, []).append(number if counts else torch.zeros_like(number))
    here = {
        mesh: torch.stack(numbers).sum() if kind == "sum" else torch.stack(numbers).max()
        for mesh, numbers in found.items()
    }
    if exchange is not None:
        return [exchange.sum(number) if kind == "sum" else exchange.max(number) for number in here.values()]
    return [
        DTensor.from_local(number, mesh, [Partial(kind)] * mesh.ndim, run_check=False).full_tensor()
        for mesh, number in here.items()
    ]


def _agreed(number: Tensor) -> float:
    agreement = _AGREEMENT.get()
    return float(number if agreement is None else agreement(number))


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """⟨x, y⟩, summed over all tensors (0 for empty lists), also where it is beyond the numbers of their precision."""
    if not x:
        return 0.0
    found, limits = _agreed(torch.stack(_dots(x, y)).sum()), torch.finfo(x[0].dtype)
    if limits.tiny / limits.eps <= abs(found) < math.inf or not num_entries(x):
        return found
    a = max_abs(x)
    b = a if x is y else max_abs(y)
    if not (0 < a < math.inf and 0 < b < math.inf):
        return found
    return a * b * _agreed(torch.stack(_dots([u / a for u in x], [v / b for v in y])).sum())


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
    found = [a.abs().max() for a in _plain(x) if a.numel()]
    cut = [_without_partial(a) for a in x if is_distributed(a)]
    parts = [_local(a).abs() for a in cut]  # of which nothing may be here
    largest = [part.max() if part.numel() else part.new_zeros(()) for part in parts]
    return _agreed(torch.stack(found + _joined(list(zip(cut, largest, strict=True)), "max")).max())


def _without_partial(x: Tensor) -> Tensor:
    """A DTensor without sums that are pending."""
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(x, DTensor)  # for mypy
    return x.redistribute(placements=[Replicate() if place.is_partial() else place for place in x.placements])


def add(x: Sequence[Tensor], y: Sequence[Tensor], alpha: float = 1.0) -> Vector:
    """x + αy, as new tensors."""
    return [torch.add(a, b, alpha=_representable(alpha, a)) for a, b in zip(x, y, strict=True)]


def add_(x: Sequence[Tensor], y: Sequence[Tensor], alpha: float = 1.0) -> None:
    """x ← x + αy, in place."""
    for a, b in zip(x, y, strict=True):
        a.add_(b, alpha=_representable(alpha, a))


def _representable(alpha: float, like: Tensor) -> float:
    """α, or an infinity where it is beyond the numbers of this precision, at which `add` raises an error."""
    return alpha if abs(alpha) <= torch.finfo(like.dtype).max else alpha * math.inf


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
    cut = [a for a in x if is_distributed(a)]
    if not all(math.isfinite(float(n)) for n in _joined([(a, _local(a).sum()) for a in cut], "sum")):
        return max_abs([torch.isfinite(a).logical_not().to(a.dtype) for a in cut]) == 0 and is_finite(_plain(x))
    return all(math.isfinite(float(a.sum())) or bool(torch.isfinite(a).all()) for a in _plain(x))


def _plain(x: Sequence[Tensor]) -> Vector:
    return [a for a in x if not is_distributed(a)]


def num_entries(x: Sequence[Tensor]) -> int:
    """The number of entries of all tensors."""
    return sum(a.numel() for a in x)


def flatten(x: Sequence[Tensor]) -> Tensor:
    """One flat tensor of all entries, in order; of DTensors too, whole on every process."""
    return torch.cat([_whole(a).reshape(-1) for a in x])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> Vector:
    """Cut a flat tensor into the shapes of `like`, and into their parts where they are DTensors."""
    parts = flat.split([a.numel() for a in like])
    return [stored_like(part.view(a.shape), a) for part, a in zip(parts, like, strict=True)]


def stored_like(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, cut as `like` is where that is a DTensor; no message."""
    if not is_distributed(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)  # for mypy
    mesh = like.device_mesh
    laid = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return laid.redistribute(placements=like.placements)


def symmetric_product(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """XᵀY, known to be symmetric, in `dtype`: block columns of the lower triangle, mirrored; 9/16 of the work."""
    X, Y = X.to(dtype), Y.to(dtype)
    size = X.shape[1]
    total = torch.empty(size, size, dtype=dtype, device=X.device)
    width = max(96, -(-size // 8))
    for start in range(0, size, width):
        stop = min(start + width, size)
        columns = X[:, start:].mT @ Y[:, start:stop]
        total[start:, start:stop] = columns
        total[start:stop, stop:] = columns[stop - start :].mT
    return total
