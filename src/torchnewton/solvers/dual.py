"""The damped system in the space of the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from torchnewton.costs import StatesCosts, cholesky_flops
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.solvers.rows import Factored, Rows
from torchnewton.vectors import Vector, add, norm, zeros_like

_EIGENDECOMPOSITION = 27  # Cholesky factorizations that take as long as one eigendecomposition, by operations
_Inverse: TypeAlias = Callable[[Tensor], Tensor]  # w ↦ (RRᵀ + σI)⁻¹w

_REFINEMENTS = 3  # each gains the digits by which a single-precision factorization beats the condition number
_REFINED = 1e-8  # the residual at which refinement stops
_GAIN = 1e-2  # what one solve in single precision must leave of a residual: then that much is left after all steps


@dataclass(frozen=True)
class Dual:
    """Solves (RᵀR + σI)x = b with few rows n in R and σ > 0 by a factorization of n×n.

        x = Rᵀ(RRᵀ + σI)⁻¹y          where b = Rᵀy with a known y, as for the gradient
        x = (b − Rᵀ(RRᵀ + σI)⁻¹Rb) / σ   otherwise

    The Gram matrix RRᵀ is formed and factorized in the precision of b, in float64 where σ < 1e-6·‖RRᵀ‖, and solves with
    it are refined in float64 until they leave 1e-8; where R has it cheaply, all is in float64. What
    rounding is left in RRᵀ is mended by at most `max_refinements` steps x ← x + A⁻¹(b − Ax) until ‖b − Ax‖ is at most
    `rtol`·‖b‖. With a known y, that norm comes from the Gram matrix, as exact as Rᵀy = b is, and the result tells xᵀAx
    in the place of the residual itself.
    `SolveResult.shifted` solves for other σ with the same Gram matrix: by one Cholesky factorization each, or, where
    `num_shifts` of them are announced and that is cheaper, by one eigendecomposition for all.

    `x0` and `preconditioner` are not used. Cost: RRᵀ, n³/3 operations, and 2 products with each of R and Rᵀ, with a
    known y one. Memory: 2n² numbers and what R keeps. Errors: `ValueError` for an operator without R (its closure mixes
    samples) or without a shift σ > 0.
    Source: Sherman, Morrison and Woodbury; Björck, "Numerical Methods for Least Squares Problems", section 2.7.
    """

    rtol: float = 1e-4
    max_refinements: int = 2
    num_shifts: int = 1

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.max_refinements >= 0 and self.num_shifts >= 1):
            raise ValueError(
                f"Dual: rtol={self.rtol} and max_refinements={self.max_refinements} must not be negative, "
                f"num_shifts={self.num_shifts} at least 1."
            )

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
        double = R.double()
        flops = cholesky_flops(R.num_rows) + (A.costs(1).gram_flops if isinstance(A, StatesCosts) else 0.0)
        return self._solve(_Gram(double or R, b, self.num_shifts, double is not None), shift, flops)

    def _solve(self, gram: _Gram, shift: float, flops: float) -> SolveResult:
        b = gram.b
        inverse = gram.inverse(shift)
        if isinstance(inverse, Status):
            return self._failed(b, inverse)
        y = gram.R.preimage(b)
        if y is None:
            found = _in_parameters(gram, shift, inverse, _approximate(gram, shift, inverse, b))
        else:
            found = _in_rows(gram, shift, inverse, y.double(), inverse(y.double()))
        tolerance = self.rtol * norm(b)
        refinements = 0
        while refinements < self.max_refinements and found.size > tolerance:
            better = found.refined()
            refinements += 1
            if not better.size < found.size:
                break
            found = better
        if not math.isfinite(found.size):
            return self._failed(b, Status.NOT_FINITE)
        return SolveResult(
            _like(found.x, b),
            None if found.residual is None else _like(found.residual, b),
            found.size,
            Status.CONVERGED if found.size <= tolerance else Status.MAX_ITERATIONS,
            1 + refinements,
            method=f"dual ({gram.factorization})",
            reuse=lambda rhs: _like(_approximate(gram, shift, inverse, rhs), b),
            shifted=lambda more: self._solve(gram, shift + more, cholesky_flops(gram.R.num_rows)),
            flops=flops,
            curvature=found.curvature,
        )

    def _failed(self, b: Vector, status: Status) -> SolveResult:
        return SolveResult(zeros_like(b), list(b), norm(b), status, 0, method="dual (Cholesky)")


@dataclass(frozen=True)
class _Found:
    """x with the norm of b − Ax, and b − Ax itself or xᵀAx; `refined` is one step better."""

    x: Vector
    size: float
    refined: Callable[[], _Found]
    residual: Vector | None = None
    curvature: float | None = None


def _in_rows(gram: _Gram, shift: float, inverse: _Inverse, y: Tensor, w: Tensor) -> _Found:
    """x = Rᵀw for b = Rᵀy.

    The residual b − Ax is Rᵀe with e = y − σw − Rx, its norm the root of eᵀ(RRᵀ)e, to which the rounding of RRᵀ is
    added: beside x, nothing in the shape of the parameters is formed.
    """
    x = gram.R.adjoint(w)
    moved = gram.R.product(x).double()
    e = y - shift * w - moved
    K = gram.matrix(shift)
    squared = abs(float(e @ (K @ e.to(K.dtype)).double())) + torch.finfo(K.dtype).eps * gram.size * float(e @ e)
    return _Found(
        x,
        math.sqrt(squared),
        refined=lambda: _in_rows(gram, shift, inverse, y, w + inverse(e)),
        curvature=float(moved @ (moved + shift * w)),
    )


def _in_parameters(gram: _Gram, shift: float, inverse: _Inverse, x: Vector) -> _Found:
    """x for any b, with the residual b − Ax."""
    back = gram.R.adjoint(gram.R.product(x))
    residual = [r.add_(d, alpha=shift).neg_().add_(c) for r, d, c in zip(back, x, gram.b, strict=True)]

    def refined() -> _Found:
        return _in_parameters(gram, shift, inverse, add(x, _approximate(gram, shift, inverse, residual)))

    return _Found(x, norm(residual), refined, residual)


def _approximate(gram: _Gram, shift: float, inverse: _Inverse, rhs: Vector) -> Vector:
    """(rhs − Rᵀ(RRᵀ + σI)⁻¹R rhs) / σ."""
    inner = inverse(gram.R.product(rhs).double())
    return [x.sub_(r).div_(-shift) for x, r in zip(gram.R.adjoint(inner), rhs, strict=True)]


def _like(x: Vector, b: Vector) -> Vector:
    return [y.to(c.dtype) for y, c in zip(x, b, strict=True)]


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

    @cached_property
    def size(self) -> float:
        """‖RRᵀ‖."""
        return float(self._single.norm())

    def matrix(self, shift: float) -> Tensor:
        """RRᵀ, in float64 where the shift asks for it."""
        if "_double" in self.__dict__ or shift < 1e-6 * self.size:
            return self._double
        return self._single

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, basis = torch.linalg.eigh(self._double)
        return values, basis

    def inverse(self, shift: float) -> _Inverse | Status:
        """w ↦ (RRᵀ + σI)⁻¹w, or why not."""
        if self.factorization == "eigendecomposition" and bool(torch.isfinite(self._double).all()):
            values, basis = self._spectrum
            return lambda w: basis @ ((basis.mT @ w) / (values.clamp(min=0) + shift))
        matrix = self.matrix(shift)
        if matrix.dtype is not torch.float64:
            return _refined(matrix, shift) or _factorized(matrix.double(), shift)
        return _factorized(matrix, shift)


def _factorized(matrix: Tensor, shift: float) -> _Inverse | Status:
    """w ↦ (K + σI)⁻¹w by a Cholesky factorization."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) > 0:
        finite = bool(torch.isfinite(shifted).all())
        return Status.NOT_POSITIVE_DEFINITE if finite else Status.NOT_FINITE
    return lambda w: torch.cholesky_solve(w.unsqueeze(1), factor).squeeze(1)


def _refined(matrix: Tensor, shift: float) -> _Inverse | None:
    """The same by a factorization in single precision, refined in double; None where that does not converge."""
    coarse = _factorized(matrix, shift)
    if isinstance(coarse, Status):
        return None
    double = matrix.double()

    def solve(w: Tensor) -> Tensor:
        x = coarse(w.to(matrix.dtype)).double()
        for _ in range(_REFINEMENTS):
            left = w - double @ x - shift * x
            if float(left.norm()) <= _REFINED * float(w.norm()):  # less than the rounding in the matrix itself
                break
            x = x + coarse(left.to(matrix.dtype)).double()
        return x

    probe = torch.ones(len(matrix), dtype=torch.float64, device=matrix.device)
    x = coarse(probe.to(matrix.dtype)).double()
    left = probe - double @ x - shift * x
    return solve if float(left.norm()) <= _GAIN * float(probe.norm()) else None
