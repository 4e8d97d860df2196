"""A loss as a user writes it, and the same loss taken apart by hand into outputs z and ℓ(z)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A closure, its parameters, and f = ℓ(z) by hand; `rtol` is what float64 parameters must agree to."""

    params: list[Tensor]
    closure: Callable[[], Any]
    outputs: Callable[[], Sequence[Tensor]]
    loss: Callable[..., Tensor]
    rtol: float = 1e-10


def problem(
    params: Sequence[Tensor] | nn.Module,
    outputs: Callable[[], Sequence[Tensor]],
    loss: Callable[..., Tensor],
    closure: Callable[[], Any] | None = None,
    rtol: float = 1e-10,
) -> Problem:
    """A problem whose closure is ℓ(z) itself unless another one is given."""
    listed = list(params.parameters()) if isinstance(params, nn.Module) else list(params)
    return Problem(listed, closure or (lambda: loss(*outputs())), outputs, loss, rtol)


def uniform(*shape: int, low: float = -1.0, high: float = 1.0, seed: int = 2) -> Tensor:
    """Fixed data, uniform between two bounds."""
    return torch.empty(shape).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 3) -> Tensor:
    """Fixed labels or tokens below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
