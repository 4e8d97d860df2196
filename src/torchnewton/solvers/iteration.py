"""What the iterative solvers share: their limits, how they start and end, the search for negative curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.costs import StatesCosts
from torchnewton.solvers.result import Operator, Status
from torchnewton.solvers.stopping import StoppingRule
from torchnewton.vectors import Vector, add, add_, clone, dot, is_finite, norm, scale, zeros_like


@dataclass(frozen=True)
class Iterative:
    """Stops at ‖b − Ax‖ ≤ max(`rtol`·‖b‖, `atol`), at `stop` if one is given, or after `max_iterations`."""

    rtol: float = 1e-5
    atol: float = 0.0
    max_iterations: int = 100
    stop: StoppingRule | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.rtol < 0 or self.atol < 0:
            raise ValueError(f"{name}: rtol={self.rtol} and atol={self.atol} must not be negative.")
        if self.max_iterations < 1:
            raise ValueError(f"{name}: max_iterations={self.max_iterations} must be at least 1.")

    def _tolerance(self, b: Sequence[Tensor]) -> float:
        size = norm(b)
        return max(self.rtol * size, self.atol) if math.isfinite(size) else math.nan  # which nothing meets

    def _status(self, model: Sequence[float], r: Sequence[Tensor], tolerance: float) -> Status | None:
        """After the iterations whose model values are given, the start included."""
        if norm(r) <= tolerance:
            return Status.CONVERGED
        status = self.stop.check(model, r) if self.stop is not None else None
        if status is None and len(model) > self.max_iterations:
            return Status.MAX_ITERATIONS
        return status

    def _model(self, d: Sequence[Tensor], r0: Sequence[Tensor], r: Sequence[Tensor]) -> float:
        """½dᵀAd − r0ᵀd from Ad = r0 − r; only a stopping rule asks for it."""
        return 0.0 if self.stop is None else -0.5 * (dot(d, r0) + dot(d, r))


class MostNegative:
    """Keeps the direction of the smallest pᵀAp / pᵀp ≤ 0 it is shown."""

    def __init__(self) -> None:
        self.direction: Vector | None = None
        self.quotient = 0.0

    def show(self, p: Sequence[Tensor], curvature: float) -> None:
        """A direction and its pᵀAp."""
        if curvature > 0:
            return
        squared = dot(p, p)
        if squared > 0 and (self.direction is None or curvature / squared < self.quotient):
            self.direction, self.quotient = clone(p), curvature / squared


def product(A: Operator, v: Sequence[Tensor]) -> Vector:
    """A @ v for an operator on lists, or a plain matrix on a list of one flat tensor."""
    return [A @ v[0]] if isinstance(A, Tensor) else A @ v


def announce(A: Operator, num_products: int) -> None:
    """Tell an operator that can prepare for it how many products will follow."""
    if isinstance(A, StatesCosts):
        A.expect(num_products)


def initial_residual(A: Operator, b: Sequence[Tensor], x0: Sequence[Tensor] | None) -> Vector:
    """b − Ax₀; b itself without a start: not to be changed in place."""
    return list(b) if x0 is None else add(b, product(A, x0), -1.0)


def ratio(a: float, b: float, like: Sequence[Tensor]) -> float:
    """a/b, infinite where the dtype ends: torch refuses a factor it cannot hold, and takes ∞."""
    quotient = a / b if b else math.inf
    return quotient if abs(quotient) <= torch.finfo(like[0].dtype).max else math.inf


def combine(vectors: Sequence[Sequence[Tensor]], coefficients: Tensor) -> Vector:
    """Σ cᵢvᵢ."""
    first, *others = coefficients.tolist()
    total = scale(vectors[0], first)
    for v, c in zip(vectors[1:], others, strict=True):
        add_(total, v, c)
    return total


def accepted(
    x: Vector, r: Vector, status: Status, x0: Sequence[Tensor] | None, r0: Vector
) -> tuple[Vector, Vector, Status]:
    """The iterate and its residual; the start where one of them overflowed."""
    if is_finite(x) and is_finite(r):
        return x, r, status
    usable = x0 is not None and is_finite(x0)
    return clone(x0) if x0 is not None and usable else zeros_like(x), r0, Status.NOT_FINITE
