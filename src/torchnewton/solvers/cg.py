"""The conjugate gradient method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchnewton.solvers.iteration import Iterative, accepted, announce, initial_residual, product, ratio
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import Vector, add, add_, clone, dot, is_finite, norm, zeros_like


@dataclass(frozen=True)
class CG(Iterative):
    """Preconditioned conjugate gradients for symmetric positive definite A.

    Stops at ‖b − Ax‖ ≤ max(`rtol`·‖b‖, `atol`), at `stop` if one is given, or after `max_iterations` products. On a
    direction p with pᵀAp ≤ 0 it ends with the iterate so far and returns p; on a product that is not finite it ends
    with the last finite iterate.

    With `keep` γ > 1 the iterates 1, 2, …, each next one at least γ times as late, are kept in `SolveResult.iterates`;
    `Newton` then goes back from the last to earlier ones as long as the objective falls, as Martens does with γ = 1.3.

    Cost: one product, two inner products and three vector updates an iteration; memory: four vectors, and those kept.
    Errors: `ValueError` for arguments.
    Source: Hestenes and Stiefel, 1952; the preconditioned form of Golub and Van Loan, algorithm 11.5.1.

    >>> A, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    >>> CG().solve(A, [b]).solution
    [tensor([0.0909, 0.6364])]
    """

    keep: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not self.keep > 1:
            raise ValueError(f"CG: keep={self.keep} must be greater than 1, or None.")

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        announce(A, self.max_iterations)
        x = zeros_like(b) if x0 is None else clone(x0)
        r0 = initial_residual(A, b, x0)
        r = clone(r0)
        tolerance = self._tolerance(b)
        z = r if preconditioner is None else product(preconditioner, r)
        p = clone(z)
        rz = dot(r, z)
        model = [0.0]
        status, negative = None, None
        kept: list[tuple[Vector, float]] = []
        next_kept = 1
        if not math.isfinite(rz):
            status = Status.NOT_FINITE
        elif norm(r) <= tolerance:
            status = Status.CONVERGED
        elif rz <= 0:
            status = Status.INDEFINITE_PRECONDITIONER
        products = int(x0 is not None)
        while status is None:
            Ap = product(A, p)
            products += 1
            pAp = dot(p, Ap)
            if not math.isfinite(pAp) or not is_finite(Ap):
                status = Status.NOT_FINITE
            elif pAp <= 0:
                status, negative = Status.NEGATIVE_CURVATURE, p
            else:
                alpha = ratio(rz, pAp, r)
                add_(x, p, alpha)
                add_(r, Ap, -alpha)
                model.append(model[-1] - 0.5 * alpha * rz)
                z = r if preconditioner is None else product(preconditioner, r)
                rz, previous = dot(r, z), rz
                p = add(z, p, ratio(rz, previous, r))
                status = self._status(model, r, tolerance)
                if self.keep is not None and status is None and len(model) > next_kept:
                    kept.append((clone(x), dot(x, b) - dot(x, r)))
                    next_kept = max(next_kept + 1, math.ceil(self.keep * next_kept))
                if status is None and rz <= 0:
                    status = Status.INDEFINITE_PRECONDITIONER
        iterations = len(model) - 1
        x, r, status = accepted(x, r, status, x0, r0)
        return SolveResult(x, r, norm(r), status, iterations, products, negative, "CG", iterates=kept)
