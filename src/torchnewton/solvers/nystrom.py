"""The randomized Nyström preconditioner."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchnewton.solvers.iteration import product
from torchnewton.solvers.lanczos import random_like
from torchnewton.solvers.preconditioners import Preconditioner
from torchnewton.solvers.result import Operator
from torchnewton.vectors import Vector, add, norm, num_entries, scale


class Nystrom(Preconditioner):
    """(A + λI)⁻¹ from the leading part UΛUᵀ of a positive semidefinite A, λ = `damping`.

        M = U(Λ + λI)⁻¹Uᵀ + (I − UUᵀ) / (λ_r + λ)

    `Nystrom.sketch` finds U and Λ; `at` gives M for another λ and the same A at no cost. `basis` is U, one tensor of
    shape (rank, *shape) per parameter; `eigenvalues` is Λ, descending; `error` estimates ‖A − UΛUᵀ‖ where it was asked
    for. The condition number of M(A + λI) is at most (λ_r + λ + ‖A − UΛUᵀ‖) / λ.

    Cost: 4rP operations a product; memory: r vectors. Errors: `ValueError` where λ_r + λ is not positive.
    Source: Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44, 2023 (arXiv 2110.02820), section 5.
    Deviation: M is divided by λ_r + λ, so that it has the scale of (A + λI)⁻¹; iterates of CG are the same.

    >>> M = Nystrom.sketch(torch.diag(torch.tensor([9.0, 0.0, 0.0])), [torch.zeros(3)], rank=2, damping=1.0)
    >>> M @ torch.ones(3)
    tensor([0.1000, 1.0000, 1.0000])
    """

    def __init__(
        self, basis: Sequence[Tensor], eigenvalues: Tensor, damping: float, error: float | None = None
    ) -> None:
        super().__init__([U[0] if len(U) else U.new_zeros(U.shape[1:]) for U in basis])
        self.basis, self.eigenvalues, self.damping, self.error = list(basis), eigenvalues, damping, error
        smallest = float(eigenvalues[-1]) if len(eigenvalues) else 0.0
        if smallest + damping <= 0:
            raise ValueError(f"Nystrom: damping={damping} must be positive, since λ_r = {smallest}.")
        self.rest = 1.0 / (smallest + damping)
        self.weights = 1.0 / (eigenvalues + damping) - self.rest

    def at(self, damping: float) -> Nystrom:
        """The same eigenpairs with another damping."""
        return Nystrom(self.basis, self.eigenvalues, damping, self.error)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `Preconditioner.apply`."""
        return add(scale(v, self.rest), _spanned(self.basis, v, self.weights))

    @classmethod
    def sketch(
        cls,
        A: Operator,
        like: Sequence[Tensor],
        rank: int,
        damping: float,
        generator: torch.Generator | None = None,
        max_rank: int | None = None,
    ) -> Nystrom:
        """From `rank` products with A and random vectors like `like`.

        With `max_rank` the rank is doubled, and the products kept, until ‖A − UΛUᵀ‖ ≤ 10λ by ten steps of the power
        method, or `max_rank` is reached. A product that is not finite gives rank 0, M = I/λ.
        Source: algorithm 2.1 and appendix E of the paper; the 10 is ours.
        """
        if rank < 1 or (max_rank is not None and max_rank < rank):
            raise ValueError(f"Nystrom: rank={rank} must be at least 1, and at most max_rank={max_rank}.")
        generator = generator or torch.Generator().manual_seed(0)
        limit = min(rank if max_rank is None else max_rank, num_entries(like))
        omega = [x.new_zeros((0, *x.shape)) for x in like]
        Y, error = omega, None
        while True:
            fresh = _orthonormal_block(omega, like, min(rank, limit) - len(omega[0]), generator)
            omega = _joined(omega, fresh)
            Y = _joined(Y, _products(A, fresh))
            if not all(bool(torch.isfinite(y).all()) for y in Y):
                return cls([x.new_zeros((0, *x.shape)) for x in like], like[0].new_zeros(0), damping)
            basis, eigenvalues = _eigenpairs(omega, Y)
            if max_rank is None:
                break
            error = _error(A, basis, eigenvalues, random_like(like, generator))
            if error <= 10 * damping or rank >= limit:
                break
            rank *= 2
        return cls(basis, eigenvalues, damping, error)


def _rows(parts: Sequence[Tensor]) -> list[Tensor]:
    return [part.reshape(len(part), math.prod(part.shape[1:])) for part in parts]


def _inner(X: Sequence[Tensor], Y: Sequence[Tensor]) -> Tensor:
    """⟨xᵢ, yⱼ⟩ over all parameters."""
    return torch.stack([x @ y.mT for x, y in zip(_rows(X), _rows(Y), strict=True)]).sum(0)


def _combined(weights: Tensor, X: Sequence[Tensor]) -> Vector:
    """Σⱼ wᵢⱼxⱼ as new rows."""
    return [(weights.to(x.dtype) @ rows).view(len(weights), *x.shape[1:]) for rows, x in zip(_rows(X), X, strict=True)]


def _spanned(U: Sequence[Tensor], v: Sequence[Tensor], weights: Tensor) -> Vector:
    """U diag(weights) Uᵀv."""
    coefficients = weights * _inner([x.unsqueeze(0) for x in v], U)
    return [x.squeeze(0) for x in _combined(coefficients, U)]


def _orthonormal(X: Sequence[Tensor]) -> tuple[Vector, Tensor]:
    """Q and R with rows X = RᵀQ, Q orthonormal: a QR factorization per parameter, and one of all their R."""
    factors = [torch.linalg.qr(x.mT) for x in _rows(X)]
    Q, R = torch.linalg.qr(torch.cat([factor.R for factor in factors]))
    parts = Q.split([len(factor.R) for factor in factors])
    return [(f.Q @ q).mT.reshape(len(x), *x.shape[1:]) for f, q, x in zip(factors, parts, X, strict=True)], R


def _orthonormal_block(omega: Vector, like: Sequence[Tensor], count: int, generator: torch.Generator) -> Vector:
    """Random orthonormal vectors, orthogonal to those there are."""
    fresh = random_like([x.new_empty((count, *x.shape)) for x in like], generator)
    for _ in range(2):
        fresh = add(fresh, _combined(_inner(fresh, omega), omega), -1.0)
        fresh, _ = _orthonormal(fresh)
    return fresh


def _products(A: Operator, X: Vector) -> Vector:
    products = [product(A, [x[j] for x in X]) for j in range(len(X[0]))]
    return [torch.stack(part) for part in zip(*products, strict=True)]


def _joined(X: Vector, Y: Vector) -> Vector:
    return [torch.cat(pair) for pair in zip(X, Y, strict=True)]


def _eigenpairs(omega: Vector, Y: Vector) -> tuple[Vector, Tensor]:
    """Those of Y(ΩᵀY)⁺Yᵀ for Y = AΩ, by the shift νI that keeps ΩᵀY positive definite in spite of rounding."""
    nu = torch.finfo(Y[0].dtype).eps * norm(Y)
    Y = add(Y, omega, nu)
    core = _inner(omega, Y).double()
    theta, Q = torch.linalg.eigh(0.5 * (core + core.mT))
    kept = theta > 0.5 * nu
    if not bool(kept.any()):
        return [y[:0] for y in Y], Y[0].new_zeros(0)
    B = _combined((Q[:, kept] / theta[kept].sqrt()).mT, Y)
    basis, R = _orthonormal(B)
    left, sigma, _ = torch.linalg.svd(R, full_matrices=False)
    return _combined(left.mT, basis), (sigma * sigma - nu).clamp(min=0)


def _error(A: Operator, basis: Vector, eigenvalues: Tensor, v: Vector) -> float:
    """‖A − UΛUᵀ‖ from below, by ten steps of the power method."""
    size = norm(v)
    for _ in range(10):
        v = scale(v, 1.0 / size)
        v = add(product(A, v), _spanned(basis, v, eigenvalues), -1.0)
        size = norm(v)
        if size == 0 or not math.isfinite(size):
            break
    return size
