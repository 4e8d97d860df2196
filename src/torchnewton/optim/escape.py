"""Leaving a saddle point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchnewton.solvers import Lanczos, Operator, SolveResult, Status
from torchnewton.solvers.lanczos import random_like
from torchnewton.vectors import Vector, dot, norm, scale


@dataclass(frozen=True)
class SaddleEscape:
    """Where a step promises next to nothing, follow negative curvature to the trust radius.

    A step is poor where its predicted reduction is at most `share`·|f| or its length at most `share` of the radius, as
    where g vanishes. Then p is the direction of negative curvature the solver has met, or the lowest Ritz vector of
    `num_products` Lanczos steps from a random start of its own (g need not lean to p); signed so that gᵀp ≤ 0 it takes
    the place of the step where the model falls lower along it.

    Cost: at poor steps `num_products` products. The random numbers come from the step's number.
    """

    share: float = 1e-4
    num_products: int = 20

    def __post_init__(self) -> None:
        if not (self.share >= 0 and self.num_products >= 1):
            raise ValueError(
                f"SaddleEscape: share={self.share} must not be negative, num_products={self.num_products} positive."
            )

    def better(
        self, result: SolveResult, A: Operator, gradient: Vector, value: float, radius: float, seed: int
    ) -> SolveResult:
        """`result`, or the way out of a saddle."""
        predicted = _predicted(result, gradient, radius)
        if predicted > self.share * abs(value) and norm(result.solution) > self.share * radius:
            return result
        p, spent = result.negative_curvature, 0
        if p is None:
            p, spent = self._lowest(A, gradient, seed)
        if p is None:
            return replace(result, num_products=result.num_products + spent)
        d = scale(p, (-1.0 if dot(gradient, p) > 0 else 1.0) * radius / norm(p))
        curvature = dot(d, A @ d)
        if not -dot(gradient, d) - 0.5 * curvature > predicted:
            return replace(result, num_products=result.num_products + spent + 1)
        return replace(
            result,
            solution=d,
            residual=None,
            curvature=curvature,
            status=Status.NEGATIVE_CURVATURE,
            num_products=result.num_products + spent + 1,
            method="negative curvature",
        )

    def _lowest(self, A: Operator, like: Sequence[Tensor], seed: int) -> tuple[Vector | None, int]:
        """The Ritz vector of the lowest Ritz value, where that is negative beyond rounding."""
        start = random_like(like, torch.Generator().manual_seed(seed))
        found = Lanczos(self.num_products).tridiagonalize(A, start)
        if not len(found.alpha):
            return None, 1
        values, coefficients = torch.linalg.eigh(found.matrix())
        rounding = 100 * torch.finfo(like[0].dtype).eps * float(values.abs().max())
        if not (found.finite and float(values[0]) < -rounding):
            return None, len(found.basis)
        return found.combine(coefficients[:, 0]), len(found.basis)


def _predicted(result: SolveResult, gradient: Vector, radius: float) -> float:
    """The predicted reduction of the step, shortened to the radius."""
    d = result.solution
    slope, length = dot(gradient, d), norm(d)
    if length == 0:
        return 0.0
    alpha = min(1.0, radius / length)
    return -(alpha * slope + 0.5 * alpha**2 * result.curved(slope))
