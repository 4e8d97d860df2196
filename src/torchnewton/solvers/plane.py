"""The quadratic model, minimized over a few directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from torchnewton.solvers.iteration import combine, product
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import Vector, dot, inner_products, is_finite, zeros_like


@runtime_checkable
class KnowsQuadraticForm(Protocol):
    """An operator that knows a shorter way to DᵀAD than products with A."""

    def quadratic_form(
        self, directions: Sequence[Sequence[Tensor]], gram: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """DᵀAD, k×k in float64 on the CPU, and the products it took; `gram` is DᵀD, where it is known."""
        ...


@dataclass(frozen=True)
class PlaneResult:
    """The minimizer x = Σ cᵢdᵢ, −q(c), and the curvature xᵀAx = cᵀ(DᵀAD)c.

    `negative_curvature` is a unit vector p of the span with pᵀAp < 0 and gᵀp ≤ 0: the model has no minimum then, and
    x is that over the directions of positive curvature.
    """

    solution: Vector
    coefficients: list[float]
    predicted_reduction: float
    curvature: float
    status: Status
    num_products: float = 0
    negative_curvature: Vector | None = None


@dataclass(frozen=True)
class Plane:
    """Minimizes q(c) = gᵀDc + ½cᵀ(DᵀAD)c over the span of a few directions D = [d₁ … d_k].

    In an orthonormal basis of the span, so that neither lengths nor dependence of the directions matter: a direction
    of the span is left out where its share of the normalized Gram matrix is below `rtol` (default √ε of the dtype),
    and where its curvature is below the rounding errors of DᵀAD.

    Cost: k²/2 inner products, beside DᵀAD: k products and k²/2 inner products more, or what the caller pays for
    (Jdᵢ)ᵀB(Jdⱼ). Memory: one vector, k with `solve`. The k×k algebra is in float64.
    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
    arXiv 1503.05671, section 7, for d₁ the preconditioned gradient and d₂ the previous step.

    >>> A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.tensor([2.0, 2.0, 2.0])
    >>> directions = [[torch.tensor([1.0, 0.0, 0.0])], [torch.tensor([1.0, 1.0, 0.0])]]
    >>> [round(c, 3) for c in Plane().over(A, [b], directions).coefficients]
    [1.0, 1.0]
    """

    rtol: float | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise ValueError(f"Plane: rtol={self.rtol} must lie between 0 and 1.")

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """The solution in the plane of Mb and x₀ (of b alone without them): see `Solver.solve`."""
        directions = [list(b) if preconditioner is None else product(preconditioner, b)]
        if x0 is not None:
            directions.append(list(x0))
        found = self.over(A, b, directions)
        return SolveResult(
            found.solution,
            None,
            math.nan,
            found.status,
            1,
            num_products=found.num_products,
            negative_curvature=found.negative_curvature,
            method=f"plane of {len(directions)} directions",
            curvature=found.curvature,
            coefficients=tuple(found.coefficients),
        )

    @property
    def uses_previous_step(self) -> bool:
        """Whether x₀ should be the previous step: it spans the plane with Mb."""
        return True

    def over(self, A: Operator, b: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]) -> PlaneResult:
        """The part of Ax = b in the span of `directions`.

        DᵀAD comes from the operator where it knows a shorter way (`quadratic_form`), else from one product a direction.
        """
        k = len(directions)
        if k == 0:
            raise ValueError("Plane: there is no direction.")
        gram = inner_products(directions, directions)
        if isinstance(A, KnowsQuadraticForm):
            C, num_products = A.quadratic_form(directions, gram)
        else:
            C, num_products = inner_products(directions, [product(A, d) for d in directions]), k
        C = 0.5 * (C + C.mT)
        g = torch.tensor([-dot(b, d) for d in directions], dtype=torch.float64)
        if not is_finite([C, g, gram]):
            return PlaneResult(zeros_like(directions[0]), [0.0] * k, 0.0, 0.0, Status.NOT_FINITE, num_products)
        c, p = minimize_in_span(g, C, gram, torch.finfo(directions[0][0].dtype).eps, self.rtol)
        curvature, x = float(c @ C @ c), combine(directions, c)
        reduction = -float(g @ c) - 0.5 * curvature
        if not (math.isfinite(reduction) and is_finite(x)):
            return PlaneResult(zeros_like(directions[0]), [0.0] * k, 0.0, 0.0, Status.NOT_FINITE, num_products)
        negative = None if p is None else combine(directions, p)
        status = Status.CONVERGED if negative is None else Status.NEGATIVE_CURVATURE
        return PlaneResult(x, c.tolist(), reduction, curvature, status, num_products, negative)


def minimize_in_span(
    g: Tensor, C: Tensor, gram: Tensor, eps: float, rtol: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """The coefficients of the minimizer and those of the direction of most negative curvature.

    With S²= 1/diag(DᵀD) and SDᵀDS = QνQᵀ, W = SQν^{−½} has DW orthonormal; WᵀCW = RμRᵀ holds the curvatures in the
    span, known up to kε·max|μ| / min ν. NaN where they overflow.
    """
    lengths = gram.diagonal().sqrt()
    S = torch.where(lengths > 0, 1.0 / lengths, 0.0)
    nu, Q = torch.linalg.eigh(S[:, None] * gram * S)
    kept = nu > (eps**0.5 if rtol is None else rtol) * nu[-1]
    if not bool(kept.any()):
        return torch.zeros_like(g), None
    W = S[:, None] * Q[:, kept] / nu[kept].sqrt()
    reduced = W.mT @ C @ W
    if not is_finite([reduced]):
        return torch.full_like(g, math.nan), None
    mu, R = torch.linalg.eigh(reduced)
    W = W @ R
    slope = W.mT @ g
    rounding = len(g) * eps * mu.abs().max() / nu[kept].min()
    y = torch.where(mu > rounding, -slope / mu, 0.0)
    if mu[0] >= -rounding:
        return W @ y, None
    return W @ y, W[:, 0] * (-1.0 if slope[0] > 0 else 1.0)
