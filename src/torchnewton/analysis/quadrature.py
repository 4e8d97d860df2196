"""Spectral measures of a symmetric operator by the Lanczos process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature.operator import LinearOperator
from torchnewton.solvers.lanczos import Lanczos, LanczosResult, RitzValues, Rows, random_like
from torchnewton.vectors import Vector

BASIS_BYTES = 2**30  # what the bases of the probes that run together may take; one probe always runs
CONVERGED = 1e-8  # residual of a Ritz vector over ‖A‖ from which on it counts as an eigenvector


@dataclass(frozen=True)
class Quadrature:
    """Σⱼ τⱼ f(θⱼ) ≈ ∫ f dμ for a measure μ of mass 1, by the Lanczos matrix T = tridiag(β, α, β), all in float64.

    The nodes θ are the eigenvalues of T, ascending, the weights τ the squared first entries of its eigenvectors.
    Source: Golub and Welsch, 1969; Golub and Meurant, "Matrices, moments and quadrature", 2010, section 6.2.
    """

    alpha: Tensor
    beta: Tensor

    @cached_property
    def rule(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights."""
        nodes, S = torch.linalg.eigh(torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1))
        weights = S[0].square()
        return nodes, weights / weights.sum()

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        """The least and the most that a measure with the same 2m − 1 moments can have in (low, high).

        All of them have Σ_{j<i} τⱼ ≤ μ((−∞, θᵢ)) and μ((−∞, θᵢ]) ≤ Σ_{j≤i} τⱼ (Chebyshev, Markov, Stieltjes): of the
        nodes on both sides of an end it is open where their mass lies.
        Source: Szegő, "Orthogonal polynomials", section 3.41.
        """
        nodes, weights = self.rule
        inside = (nodes > low) & (nodes < high)
        is_open = torch.zeros_like(inside)
        for end in (low, high):
            i = int((nodes < end).sum())
            is_open[max(0, i - 1) : i + 1] |= -math.inf < end < math.inf
        return float(weights[inside & ~is_open].sum()), float(weights[inside | is_open].sum())

    def halved(self) -> Quadrature:
        """The rule after half of the iterations."""
        size = (len(self.alpha) + 1) // 2
        return Quadrature(self.alpha[:size], self.beta[: size - 1])


@dataclass(frozen=True)
class Measures:
    """Eigenvalues that are known one by one, and a quadrature a probe for all others together."""

    extremes: RitzValues
    known: Tensor
    probes: tuple[Quadrature, ...]
    num_products: int


def measure(
    A: LinearOperator,
    num_probes: int,
    num_iterations: int,
    generator: torch.Generator,
    on_product: Callable[[int, int], None],
) -> Measures:
    """One run finds what eigenvectors it can; the probes are normal random vectors orthogonal to these.

    A probe v, uniform on the sphere of the complement, has the measure Σᵢ ⟨uᵢ, v⟩² δ(λᵢ) over the eigenpairs (λᵢ, uᵢ)
    that are left; the mean over v is exactly their spectral distribution.
    """
    done, total = 0, (num_probes + 1) * num_iterations

    def multiply(vs: list[Vector]) -> list[Vector]:
        nonlocal done
        products = [_without(y, Q) for y in A.apply_each(vs)]
        done += len(vs)
        on_product(done, total)
        return products

    Q = Rows(A.domain, 0)
    lanczos = Lanczos(num_iterations)
    extremes, known, Q = _ritz(_finite(lanczos.tridiagonalize_each(multiply, [random_like(A.domain, generator)]))[0])
    size = A.shape[0]
    probes: list[Quadrature] = []
    together = max(1, int(BASIS_BYTES // (num_iterations * sum(x.numel() * x.element_size() for x in A.domain))))
    count = num_probes if len(known) < size else 0
    for start in range(0, count, together):
        starts = [_without(random_like(A.domain, generator), Q) for _ in range(min(together, count - start))]
        probes += [Quadrature(x.alpha, x.beta[:-1]) for x in _finite(lanczos.tridiagonalize_each(multiply, starts))]
    on_product(done, done)
    return Measures(extremes, known, tuple(probes), done)


def _ritz(found: LanczosResult) -> tuple[RitzValues, Tensor, Rows]:
    """All Ritz values, and those that have converged with their vectors."""
    values, S = torch.linalg.eigh(found.matrix())
    residual = found.beta[-1] * S[-1].abs()
    eps = torch.finfo(found.following[0].dtype).eps
    largest = float(values.abs().max())
    kept = residual <= max(CONVERGED, 10 * eps) * largest
    Q = Rows(found.following, int(kept.sum()))
    for s in S[:, kept].T:
        u = _without(found.combine(s), Q)
        Q.append(vectors.scale(u, 1 / vectors.norm(u)))
    return RitzValues(values, residual + 10 * eps * largest), values[kept], Q


def _without(v: Vector, Q: Rows) -> Vector:
    """(I − QᵀQ)v, twice, so that rounding leaves nothing."""
    if Q.size:
        v = vectors.clone(v)
        for _ in range(2):
            Q.remove_from(v)
    return v


def _finite(found: list[LanczosResult]) -> list[LanczosResult]:
    if not all(x.finite for x in found):
        raise ValueError("spectrum: a product with the operator was not finite; look for NaN in loss and parameters.")
    return found
