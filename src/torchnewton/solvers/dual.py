"""The damped system in the space of the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from torchnewton.costs import StatesCosts
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import Vector, flatten, norm, symmetric_product, unflatten, zeros_like


@runtime_checkable
class Factored(Protocol):
    """An operator that knows A = RᵀR + σI."""

    def factored(self) -> tuple[Tensor, float] | None:
        """(R, σ), or None."""
        ...


@dataclass(frozen=True)
class Dual:
    """Solves (RᵀR + σI)x = b with few rows n in R and σ > 0 by a Cholesky factorization of n×n.

        x = (b − Rᵀ(RRᵀ + σI)⁻¹Rb) / σ

    `x0` and `preconditioner` are not used. Cost: n²P + n³/3 operations in float64. Memory: R and 2n² numbers.
    Errors: `ValueError` for an operator without a factor (its closure mixes samples) or without a shift σ > 0.
    Source: Sherman, Morrison and Woodbury; Björck, "Numerical Methods for Least Squares Problems", section 2.7.
    """

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        found = A.factored() if isinstance(A, Factored) else None
        if found is None:
            raise ValueError("Dual: the operator has no factor R with A = RᵀR + σI; use CG() or Direct().")
        R, shift = found
        if not shift > 0:
            raise ValueError(f"Dual: the damping must be positive, the shift of the operator is {shift}; use Direct().")
        gram = symmetric_product(R.mT, R.mT, R.dtype)
        gram.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(gram)
        if int(info) > 0:
            finite = bool(torch.isfinite(gram).all())
            status = Status.NOT_POSITIVE_DEFINITE if finite else Status.NOT_FINITE
            return _failure(b, status)

        def solve(rhs: Tensor) -> Tensor:
            inner = torch.cholesky_solve((R @ rhs).unsqueeze(1), factor).squeeze(1)
            return (rhs - R.mT @ inner) / shift

        def reuse(rhs: Vector) -> Vector:
            return unflatten(solve(flatten(rhs).to(R.dtype)).to(rhs[0].dtype), rhs)

        flops = dual_flops(*R.shape) + (A.costs().factor if isinstance(A, StatesCosts) else 0.0)
        flat = flatten(b).to(R.dtype)
        x = solve(flat)
        residual = unflatten((flat - R.mT @ (R @ x) - shift * x).to(b[0].dtype), b)
        if not math.isfinite(norm(residual)):
            return _failure(b, Status.NOT_FINITE)
        solution = unflatten(x.to(b[0].dtype), b)
        return SolveResult(
            solution, residual, norm(residual), Status.CONVERGED, 1, method="dual (Cholesky)", reuse=reuse, flops=flops
        )


def _failure(b: Sequence[Tensor], status: Status) -> SolveResult:
    return SolveResult(zeros_like(b), list(b), norm(b), status, 0, method="dual (Cholesky)")


def dual_flops(rows: int, size: int) -> float:
    """Operations of RRᵀ and its Cholesky factorization."""
    return rows**2 * size + rows**3 / 3
