"""The damped system in the space of the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from torchnewton.costs import StatesCosts, cholesky_flops
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import Vector, add, flatten, norm, symmetric_product, unflatten, zeros_like

_EIGENDECOMPOSITION = 27  # Cholesky factorizations that take as long as one eigendecomposition, by operations
_REFINEMENTS = 3  # each gains the digits by which a single-precision factorization beats the condition number
_SMALL = 1e9  # n²P up to which the Gram matrix is computed in float64 at once


class Rows(Protocol):
    """R, known by its products and by RRᵀ."""

    @property
    def num_rows(self) -> int:
        """n."""
        ...

    def product(self, v: Sequence[Tensor], /) -> Tensor:
        """Rv."""
        ...

    def adjoint(self, w: Tensor, /) -> Vector:
        """Rᵀw."""
        ...

    def gram(self, dtype: torch.dtype, /) -> Tensor:
        """RRᵀ."""
        ...

    def rows(self) -> Tensor:
        """R as a matrix."""
        ...

    def preimage(self, b: Sequence[Tensor], /) -> Tensor | None:
        """y with Rᵀy = b, where one is known without a solve."""
        ...


@runtime_checkable
class Factored(Protocol):
    """An operator that knows A = RᵀR + σI."""

    def factored(self) -> tuple[Rows, float] | None:
        """(R, σ), or None."""
        ...


@dataclass(frozen=True)
class Dual:
    """Solves (RᵀR + σI)x = b with few rows n in R and σ > 0 by a factorization of n×n.

        x = Rᵀ(RRᵀ + σI)⁻¹y          where b = Rᵀy with a known y, as for the gradient
        x = (b − Rᵀ(RRᵀ + σI)⁻¹Rb) / σ   otherwise

    The Gram matrix RRᵀ is formed and factorized in the precision of b, in float64 where σ < 1e-6·‖RRᵀ‖, and solves with
    it are refined to float64; where R is small, all is in float64 with R as a matrix. What rounding is left in RRᵀ is
    mended by at most `max_refinements` steps x ← x + A⁻¹(b − Ax) until ‖b − Ax‖ ≤ `rtol`·‖b‖. `SolveResult.shifted`
    solves for other σ with the same Gram matrix: by one Cholesky factorization each, or, where `num_shifts` of them are
    announced and that is cheaper, by one eigendecomposition for all.

    `x0` and `preconditioner` are not used. Cost: RRᵀ, n³/3 operations, and 2 products with each of R and Rᵀ.
    Memory: 2n² numbers and what R keeps. Errors: `ValueError` for an operator without R (its closure mixes samples) or
    without a shift σ > 0.
    Source: Sherman, Morrison and Woodbury; Björck, "Numerical Methods for Least Squares Problems", section 2.7.
    """

    rtol: float = 1e-4
    max_refinements: int = 2
    num_shifts: int = 1

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
        flops = cholesky_flops(R.num_rows) + (A.costs(1).gram if isinstance(A, StatesCosts) else 0.0)
        small = float(R.num_rows) ** 2 * sum(x.numel() for x in b) <= _SMALL
        return self._solve(_Gram(_Double(R, b) if small else R, b, self.num_shifts, small), shift, flops)

    def _solve(self, gram: _Gram, shift: float, flops: float) -> SolveResult:
        b = gram.b
        inverse = gram.inverse(shift)
        if isinstance(inverse, Status):
            return SolveResult(zeros_like(b), list(b), norm(b), inverse, 0, method="dual (Cholesky)")

        def like_b(x: Vector) -> Vector:
            return [y.to(c.dtype) for y, c in zip(x, b, strict=True)]

        def approximate(rhs: Vector) -> Vector:
            inner = inverse(gram.R.product(rhs).double())
            return [x.sub_(r).div_(-shift) for x, r in zip(gram.R.adjoint(inner), rhs, strict=True)]

        def residual_of(x: Vector) -> Vector:
            return [
                r.add_(d, alpha=shift).neg_().add_(c)
                for r, d, c in zip(gram.R.adjoint(gram.R.product(x)), x, b, strict=True)
            ]

        y = gram.R.preimage(b)
        x = approximate(b) if y is None else gram.R.adjoint(inverse(y.double()))
        residual, tolerance = residual_of(x), self.rtol * norm(b)
        refinements = 0
        while refinements < self.max_refinements and norm(residual) > tolerance:
            better = add(x, approximate(residual))
            left = residual_of(better)
            refinements += 1
            if not norm(left) < norm(residual):
                break
            x, residual = better, left
        size = norm(residual)
        if not math.isfinite(size):
            return SolveResult(zeros_like(b), list(b), norm(b), Status.NOT_FINITE, 0, method="dual (Cholesky)")
        return SolveResult(
            like_b(x),
            like_b(residual),
            size,
            Status.CONVERGED if size <= tolerance else Status.MAX_ITERATIONS,
            1 + refinements,
            method=f"dual ({gram.factorization})",
            reuse=lambda rhs: like_b(approximate(rhs)),
            shifted=lambda more: self._solve(gram, shift + more, cholesky_flops(gram.R.num_rows)),
            flops=flops,
        )


class _Double:
    """R as a matrix in float64, for few numbers: b − Rᵀw cancels by as many digits as σ is small."""

    def __init__(self, R: Rows, like: Sequence[Tensor]) -> None:
        self.R = R
        self.num_rows = R.num_rows
        self.like = [x.double() for x in like]
        self.matrix = R.rows().double()

    def product(self, v: Sequence[Tensor]) -> Tensor:
        """Rv."""
        return self.matrix @ flatten(v).double()

    def adjoint(self, w: Tensor) -> Vector:
        """Rᵀw."""
        return unflatten(self.matrix.mT @ w.double(), self.like)

    def rows(self) -> Tensor:
        """R."""
        return self.matrix

    def gram(self, dtype: torch.dtype) -> Tensor:
        """RRᵀ."""
        return symmetric_product(self.matrix.mT, self.matrix.mT, torch.float64).to(dtype)

    def preimage(self, b: Sequence[Tensor]) -> Tensor | None:
        """As R knows it."""
        return self.R.preimage(b)


class _Gram:
    """RRᵀ with its factorizations."""

    def __init__(self, R: Rows, b: Sequence[Tensor], num_shifts: int, small: bool) -> None:
        self.R = R
        self.b = list(b)
        self.factorization = "eigendecomposition" if num_shifts > _EIGENDECOMPOSITION else "Cholesky"
        self._dtype = torch.float64 if small else b[0].dtype

    @cached_property
    def _single(self) -> Tensor:
        return self.R.gram(self._dtype)

    @cached_property
    def _double(self) -> Tensor:
        return self._single if self._dtype is torch.float64 else self.R.gram(torch.float64)

    def matrix(self, shift: float) -> Tensor:
        """RRᵀ, in float64 where the shift asks for it."""
        if "_double" in self.__dict__ or shift < 1e-6 * float(self._single.norm()):
            return self._double
        return self._single

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, basis = torch.linalg.eigh(self._double)
        return values, basis

    def inverse(self, shift: float) -> Callable[[Tensor], Tensor] | Status:
        """w ↦ (RRᵀ + σI)⁻¹w, or why not."""
        if self.factorization == "eigendecomposition" and bool(torch.isfinite(self._double).all()):
            values, basis = self._spectrum
            return lambda w: basis @ ((basis.mT @ w) / (values.clamp(min=0) + shift))
        matrix = self.matrix(shift)
        if matrix.dtype is not torch.float64:
            return _refined(matrix, shift) or _factorized(matrix.double(), shift)
        return _factorized(matrix, shift)


def _factorized(matrix: Tensor, shift: float) -> Callable[[Tensor], Tensor] | Status:
    """w ↦ (K + σI)⁻¹w by a Cholesky factorization."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) > 0:
        finite = bool(torch.isfinite(shifted).all())
        return Status.NOT_POSITIVE_DEFINITE if finite else Status.NOT_FINITE
    return lambda w: torch.cholesky_solve(w.unsqueeze(1), factor).squeeze(1)


def _refined(matrix: Tensor, shift: float) -> Callable[[Tensor], Tensor] | None:
    """The same by a factorization in single precision and refinement in double; None where that does not converge."""
    coarse = _factorized(matrix, shift)
    if isinstance(coarse, Status):
        return None
    double = matrix.double()

    def solve(w: Tensor) -> Tensor:
        x = coarse(w.to(matrix.dtype)).double()
        for _ in range(_REFINEMENTS):
            x = x + coarse((w - double @ x - shift * x).to(matrix.dtype)).double()
        return x

    probe = torch.ones(len(matrix), dtype=torch.float64, device=matrix.device)
    x = solve(probe)
    left = probe - double @ x - shift * x
    return solve if float(left.norm()) <= 1e-8 * float(probe.norm()) else None
