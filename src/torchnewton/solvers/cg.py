"""The conjugate gradient method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.solvers.stopping import StoppingRule
from torchnewton.vectors import Vector, add, add_, clone, dot, is_finite, norm, zeros_like


@dataclass(frozen=True)
class CG:
    """Preconditioned conjugate gradients for symmetric positive definite A.

    Stops at ‖b − Ax‖ ≤ max(`rtol`·‖b‖, `atol`), at `stop` if one is given, or after `max_iterations` products. On a
    direction p with pᵀAp ≤ 0 it ends with the iterate so far and returns p; on a product that is not finite it ends
    with the last finite iterate.

    Cost: one product, two inner products and three vector updates an iteration; memory: four vectors.
    Source: Hestenes and Stiefel, 1952; the preconditioned form of Golub and Van Loan, algorithm 11.5.1.

    >>> A, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    >>> CG().solve(A, [b]).solution
    [tensor([0.0909, 0.6364])]
    """

    rtol: float = 1e-5
    atol: float = 0.0
    max_iterations: int = 100
    stop: StoppingRule | None = None

    def __post_init__(self) -> None:
        if self.rtol < 0 or self.atol < 0:
            raise ValueError(f"CG: rtol={self.rtol} and atol={self.atol} must not be negative.")
        if self.max_iterations < 1:
            raise ValueError(f"CG: max_iterations={self.max_iterations} must be at least 1.")

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        x = zeros_like(b) if x0 is None else clone(x0)
        r = clone(b) if x0 is None else add(b, product(A, x0), -1.0)
        tolerance = max(self.rtol * norm(b), self.atol)
        z = r if preconditioner is None else product(preconditioner, r)
        p = clone(z)
        rz = dot(r, z)
        model = [0.0]
        status, negative = None, None
        if not math.isfinite(rz):
            status = Status.NOT_FINITE
        elif norm(r) <= tolerance or rz == 0:
            status = Status.CONVERGED
        while status is None:
            Ap = product(A, p)
            pAp = dot(p, Ap)
            if not math.isfinite(pAp) or not is_finite(Ap):
                status = Status.NOT_FINITE
            elif pAp <= 0:
                status, negative = Status.NEGATIVE_CURVATURE, p
            else:
                alpha = rz / pAp
                add_(x, p, alpha)
                add_(r, Ap, -alpha)
                model.append(model[-1] - 0.5 * alpha * rz)
                z = r if preconditioner is None else product(preconditioner, r)
                rz, previous = dot(r, z), rz
                p = add(z, p, rz / previous)
                status = self._status(model, r, tolerance)
        iterations = len(model) - 1
        products = iterations + (x0 is not None) + (status is Status.NEGATIVE_CURVATURE)
        return SolveResult(x, r, norm(r), status, iterations, products, negative, "CG")

    def _status(self, model: list[float], r: Vector, tolerance: float) -> Status | None:
        if norm(r) <= tolerance:
            return Status.CONVERGED
        status = self.stop.check(model, r) if self.stop is not None else None
        if status is None and len(model) > self.max_iterations:
            return Status.MAX_ITERATIONS
        return status


def product(A: Operator, v: Sequence[Tensor]) -> Vector:
    """A @ v for an operator on lists, or a plain matrix on a list of one flat tensor."""
    return [A @ v[0]] if isinstance(A, Tensor) else A @ v
