"""How the derivatives of a sample's outputs at a cut are stored: ∂z/∂t, N × M × T."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cotangents:
    """D as it is."""

    values: Tensor

    def product(self, t: Tensor) -> Tensor:
        """D · t, N × M, for t N × T."""
        return torch.bmm(t.unsqueeze(1), self.values.mT).squeeze(1)  # twice as fast as D · t

    def adjoint(self, u: Tensor) -> Tensor:
        """Dᵀu, N × T, for u N × M."""
        return torch.bmm(u.unsqueeze(1), self.values).squeeze(1)

    def dense(self) -> Tensor:
        """N × M × T."""
        return self.values


@dataclass(frozen=True)
class SharedCotangents:
    """D = w ⊙ C with C (M × T) the same for all samples and w N × T.

    So it is where nothing but a linear layer and functions of single entries lie between cut and output; then a product
    is one with C, and D's N·M·T numbers need not be read.
    """

    weight: Tensor
    common: Tensor

    def product(self, t: Tensor) -> Tensor:
        """D · t, N × M, for t N × T."""
        return (self.weight * t) @ self.common.mT

    def adjoint(self, u: Tensor) -> Tensor:
        """Dᵀu, N × T, for u N × M."""
        return (u @ self.common).mul_(self.weight)

    def dense(self) -> Tensor:
        """N × M × T."""
        return self.weight.unsqueeze(1) * self.common


def stored(values: Tensor) -> Cotangents | SharedCotangents:
    """D in the shorter form where it has it, to rounding."""
    n, m, _ = values.shape
    if n >= 2 and m >= 2 and _shared(values[:2]) is not None:  # most others are known after two samples
        return _shared(values) or Cotangents(values)
    return Cotangents(values)


def _shared(values: Tensor) -> SharedCotangents | None:
    n, m, size = values.shape
    generator = torch.Generator(device=values.device).manual_seed(0)
    mix, t, u = (
        torch.rand(shape, generator=generator, dtype=values.dtype, device=values.device)
        for shape in ((1, m), (n, size), (n, m))
    )
    dense = Cotangents(values)
    mixed = dense.adjoint(mix.expand(n, m))
    largest = mixed.abs().argmax(0, keepdim=True)
    common = values.gather(0, largest.unsqueeze(1).expand(1, m, size)).squeeze(0)
    peak = mixed.gather(0, largest)
    found = SharedCotangents(torch.where(peak == 0, 0.0, mixed / peak), common)
    agree = _close(found.product(t), dense.product(t)) and _close(found.adjoint(u), dense.adjoint(u))
    return found if agree else None


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = 100 * torch.finfo(found.dtype).eps
    return bool((found - expected).norm() <= tolerance * expected.norm())
