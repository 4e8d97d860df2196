"""The arithmetic of a secant step: differences of points and gradients, their Gram matrix, and its solve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["multi-secant", "symmetric"]
FORMS = ("multi-secant", "symmetric")


@dataclass(frozen=True)
class SecantSolution:
    """The coefficients c of the differences, the factor that shortens S c, the rank, and what there is to say."""

    coefficients: Tensor
    scale: float
    rank: int
    status: str


@dataclass(frozen=True)
class Slice:
    """Some of the n entries of everything: S and Y (k × s), θ̄, ḡ and η (s)."""

    S: Tensor
    Y: Tensor
    point: Tensor
    gradient: Tensor
    rate: Tensor

    @classmethod
    def of(cls, points: Tensor, gradients: Tensor, rate: Tensor, earlier: Sequence[Sequence[Tensor]]) -> Slice:
        """From points (m × s) and gradients of this round, whose means are taken, and those of earlier rounds."""
        point, gradient = points.mean(0), gradients.mean(0)
        S = torch.cat([points, *(p for p, _ in earlier)]) - point
        Y = torch.cat([gradients, *(g for _, g in earlier)]) - gradient
        return cls(S, Y, point, gradient, rate)

    def gram(self) -> Tensor:
        """Inner products of the rows of S, of Y, of ḡ and of η⊙ḡ over these entries, in float64."""
        Z = torch.cat([self.S, self.Y, self.gradient[None], (self.rate * self.gradient)[None]]).double()
        return Z @ Z.T

    def moved(self, found: SecantSolution) -> Tensor:
        """θ̄ − S c − η(ḡ − Y c)."""
        c = found.coefficients.to(self.S)
        return self.point - found.scale * (c @ self.S) - self.rate * (self.gradient - c @ self.Y)


@dataclass(frozen=True)
class SecantSolve:
    """How c is found; see `WorkerSecant`."""

    form: Form
    descent: bool
    cutoff: float | None
    damping: float
    radius: float

    def __call__(self, gram: Tensor, num_current: int, dtype: torch.dtype) -> SecantSolution:
        """From the Gram matrix of all entries (2k + 2 rows); the first `num_current` differences are of this round."""
        k = len(gram) // 2 - 1
        SS, SY, YY = gram[:k, :k], gram[:k, k : 2 * k], gram[k : 2 * k, k : 2 * k]
        Sg, Yg = gram[:k, -2], gram[k : 2 * k, -2]
        kept = (SY.diagonal() > 0) if self.descent else (YY.diagonal() > 0)
        matrix, rhs = (YY, Yg) if self.form == "multi-secant" else (0.5 * (SY + SY.T), Sg)
        c = torch.zeros_like(Sg)
        cutoff = 10 * k * torch.finfo(dtype).eps if self.cutoff is None else self.cutoff
        c[kept], rank = self._pseudo_solve(matrix[kept][:, kept], rhs[kept], cutoff)
        length = math.sqrt(max(float(c @ SS @ c), 0.0))
        longest = math.sqrt(float(SS.diagonal()[:num_current].max()))
        scale = min(1.0, self.radius * longest / length) if length > 0 else 1.0
        slope = float(-scale * (Sg @ c) - gram[-1, -2] + gram[k : 2 * k, -1] @ c)
        if rank and self.descent and not slope < 0:
            return SecantSolution(torch.zeros_like(c), 1.0, 0, "the secants point uphill: a gradient step")
        short = f", shortened to {scale:.2g}" if scale < 1 else ""
        return SecantSolution(c, scale, rank, f"rank {rank} of {k} differences{short}")

    def _pseudo_solve(self, matrix: Tensor, rhs: Tensor, cutoff: float) -> tuple[Tensor, int]:
        """The pseudo-inverse of the matrix scaled to a unit diagonal, applied; and its rank."""
        if not len(rhs):
            return rhs, 0
        d = matrix.diagonal().abs().sqrt()
        d = torch.where(d > 0, d, torch.ones_like(d))
        values, vectors = torch.linalg.eigh(matrix / (d[:, None] * d))
        top = float(values.abs().max())
        large = (values if self.descent else values.abs()) > cutoff * top
        inverse = torch.where(large, 1 / (values + self.damping * top * values.sign()), 0.0)
        return (vectors @ (inverse * (vectors.T @ (rhs / d)))) / d, int(large.sum())
