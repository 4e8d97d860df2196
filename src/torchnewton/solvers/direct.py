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
from torchnewton.vectors import Vector, add, flatten, norm, num_entries, unflatten, zeros_like


@dataclass(frozen=True)
class Direct:
    """Solves Ax = b by a Cholesky factorization in float64 of `A.to_dense()`.

    `x0` and `preconditioner` are not used. Cost: P³/3 operations and what the matrix costs. Memory: 2P² numbers.
    A matrix that is not positive definite gives a status, no exception.
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
        return _solve(_dense(A).to(torch.float64), b, 0.0, flops)


def _dense(A: Any) -> Tensor:
    dense: Tensor = A if isinstance(A, Tensor) else A.to_dense()
    return dense


def _solve(matrix: Tensor, b: Sequence[Tensor], shift: float, flops: float) -> SolveResult:
    dense = matrix
    if shift:
        dense = matrix.clone()
        dense.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(dense)
    if int(info) > 0:
        finite = bool(torch.isfinite(dense).all())
        return _failure(b, Status.NOT_POSITIVE_DEFINITE if finite else Status.NOT_FINITE)

    def solve(rhs: Vector) -> Vector:
        x = torch.cholesky_solve(flatten(rhs).to(dense.dtype).unsqueeze(1), factor).squeeze(1)
        return unflatten(x.to(rhs[0].dtype), rhs)

    solution = solve(list(b))
    product = unflatten((dense @ flatten(solution).to(dense.dtype)).to(b[0].dtype), b)
    residual = add(b, product, -1.0)
    if not math.isfinite(norm(residual)):
        return _failure(b, Status.NOT_FINITE)
    return SolveResult(
        solution,
        residual,
        norm(residual),
        Status.CONVERGED,
        1,
        method="direct (Cholesky)",
        reuse=solve,
        shifted=lambda more: _solve(matrix, b, shift + more, cholesky_flops(len(matrix))),
        flops=flops,
    )


def _failure(b: Sequence[Tensor], status: Status) -> SolveResult:
    return SolveResult(zeros_like(b), list(b), norm(b), status, 0, method="direct (Cholesky)")
