"""Cholesky factorization of the dense matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchnewton.costs import StatesCosts, cholesky_flops
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.solvers.rows import Factor, Factored
from torchnewton.vectors import Vector, flatten, norm, num_entries, unflatten, zeros_like

SMALL = 1e9  # nP² up to which RᵀR in float64 is cheap


@dataclass(frozen=True)
class Direct:
    """Solves Ax = b by a Cholesky factorization in float64.

    The matrix is `A.to_dense()`. Where A = RᵀR + σI with a known R it is formed in the precision of b, and in float64
    where that is cheap or σ < 1e-6·‖RᵀR‖; then b is formed again in float64, too, where b = Rᵀy with a known y, as for
    the gradient. (Near a minimum of many samples in float32, sums of their terms had left no digit of x.)

    `x0` and `preconditioner` are not used. Cost: P³/3 operations and what the matrix costs. Memory: 2P² numbers.
    A matrix that is not positive definite gives a status, no exception. Errors: `ValueError` for more than
    `max_parameters`, the matrix of which would take gigabytes.
    """

    max_parameters: int = 20_000

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        size = num_entries(b)
        if size > self.max_parameters:
            raise ValueError(
                f"Direct: {size} parameters give a matrix of {8e-9 * size**2:.1f} GB; use CG(), or raise "
                f"max_parameters={self.max_parameters}."
            )
        flops = cholesky_flops(size) + (A.costs(1).dense_flops if isinstance(A, StatesCosts) else 0.0)
        found = A.factored() if isinstance(A, Factored) else None
        if found is None:
            return _System(_dense(A).double(), b, flatten(b).double()).solve(0.0, flops)
        R, shift = found
        return _normal_equations(R, shift, b).solve(shift, flops)


def _dense(A: Any) -> Tensor:
    dense: Tensor = A if isinstance(A, Tensor) else A.to_dense()
    return dense


def _normal_equations(R: Factor, shift: float, b: Sequence[Tensor]) -> _System:
    """RᵀR and b, in float64 where that is cheap or asked for."""
    single = b[0].dtype is not torch.float64
    if single and float(R.num_rows) * num_entries(b) ** 2 > SMALL:
        matrix, _ = R.normal_equations(None, b[0].dtype)
        if not shift < 1e-6 * float(matrix.norm()):
            return _System(matrix.double(), b, flatten(b).double())
    matrix, rhs = R.normal_equations(R.preimage(b) if single else None, torch.float64)
    return _System(matrix, b, flatten(b).double() if rhs is None else rhs)


@dataclass(frozen=True)
class _System:
    """(`matrix` + σI)x = `rhs`, both in float64; `b` is the right-hand side as it was given."""

    matrix: Tensor
    b: Sequence[Tensor]
    rhs: Tensor

    def solve(self, shift: float, flops: float) -> SolveResult:
        """x for σ = `shift`."""
        b, rhs, dense = self.b, self.rhs, self.matrix
        if shift:
            dense = dense.clone()
            dense.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(dense)
        if int(info) > 0:
            finite = bool(torch.isfinite(dense).all())
            return self._failed(Status.NOT_POSITIVE_DEFINITE if finite else Status.NOT_FINITE)

        def solve(flat: Tensor) -> Tensor:
            return torch.cholesky_solve(flat.unsqueeze(1), factor).squeeze(1)

        def like_b(flat: Tensor) -> Vector:
            return unflatten(flat.to(b[0].dtype), b)

        x = solve(rhs).to(b[0].dtype).double()
        residual = like_b(rhs - dense @ x)
        if not math.isfinite(norm(residual)):
            return self._failed(Status.NOT_FINITE)
        return SolveResult(
            like_b(x),
            residual,
            norm(residual),
            Status.CONVERGED,
            1,
            method="direct (Cholesky)",
            reuse=lambda other: like_b(solve(flatten(other).double())),
            shifted=lambda more: self.solve(shift + more, cholesky_flops(len(rhs))),
            flops=flops,
            slope=-float(rhs @ x),
        )

    def _failed(self, status: Status) -> SolveResult:
        return SolveResult(zeros_like(self.b), list(self.b), norm(self.b), status, 0, method="direct (Cholesky)")
