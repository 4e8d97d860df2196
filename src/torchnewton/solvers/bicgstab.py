"""The stabilized biconjugate gradient method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.solvers.iteration import Iterative, MostNegative, accepted, initial_residual, product, ratio
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import Vector, add, dot, norm, zeros_like


@dataclass(frozen=True)
class BiCGSTAB(Iterative):
    """Stabilized biconjugate gradients for any square A, preconditioned from the right (the residual stays b − Ax).

    Stops as `CG` does. It goes on over negative curvature and returns the direction of the most negative pᵀAp / pᵀp
    among those it multiplied with. Where an inner product it divides by vanishes, or a product is not finite, it ends
    with the iterate of the smallest residual. Convergence is not monotone, and rounding weighs more than in `CG`.

    Cost: two products and six inner products an iteration; memory: nine vectors.
    Source: van der Vorst, SIAM J. Sci. Stat. Comput. 13, 1992; for Hessians: He et al., arXiv 1606.00511.
    Deviations: an inner product has vanished when it is rounding, |⟨x, y⟩| ≤ ε‖x‖‖y‖, whatever the scale of b. It
    breaks down, too, where ε‖r‖ exceeds the smallest residual so far: rounding has taken all that was gained.

    >>> A, b = torch.tensor([[4.0, 1.0], [2.0, 3.0]]), torch.tensor([1.0, 2.0])
    >>> BiCGSTAB().solve(A, [b]).solution
    [tensor([0.1000, 0.6000])]
    """

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        r0 = initial_residual(A, b, x0)
        run = _Run(A, preconditioner, r0)
        tolerance, model = self._tolerance(b), [0.0]
        status = Status.CONVERGED if norm(r0) <= tolerance else None
        while status is None:
            status = run.first_half()
            if status is None and norm(run.r) > tolerance:
                status = run.second_half()
            if status is None:
                run.keep_best()
                model.append(self._model(run.d, r0, run.r))
                status = self._status(model, run.r, tolerance)
        d, r = run.best if status in (Status.BREAKDOWN, Status.NOT_FINITE) else (run.d, run.r)
        x, r, status = accepted(d if x0 is None else add(x0, d), r, status, x0, r0)
        products = run.num_products + (x0 is not None)
        return SolveResult(x, r, norm(r), status, len(model) - 1, products, run.found.direction, "BiCGSTAB")


class _Run:
    """The letters of van der Vorst; d and r belong together after each half."""

    def __init__(self, A: Operator, M: Operator | None, r0: Vector) -> None:
        self.A, self.M, self.shadow = A, M, r0
        self.d, self.r = zeros_like(r0), r0
        self.p, self.v = zeros_like(r0), zeros_like(r0)
        self.alpha = self.omega = 1.0
        self.rho = 0.0  # before the first direction
        self.best, self.smallest = (self.d, self.r), norm(r0)
        self.found = MostNegative()
        self.num_products = 0

    def keep_best(self) -> None:
        """Convergence is not monotone: what is left when the recurrence ends early."""
        if norm(self.r) < self.smallest:
            self.best, self.smallest = (self.d, self.r), norm(self.r)

    def _product(self, p: Vector) -> tuple[Vector, Vector]:
        """Mp and AMp; the curvature along Mp is looked at."""
        y = p if self.M is None else product(self.M, p)
        v = product(self.A, y)
        self.num_products += 1
        curvature = dot(y, v)
        if math.isfinite(curvature):
            self.found.show(y, curvature)
        return y, v

    def first_half(self) -> Status | None:
        """The step αMp of biconjugate gradients."""
        rho = dot(self.shadow, self.r)
        if status := _vanished(rho, self.shadow, self.r):
            return status
        if torch.finfo(self.r[0].dtype).eps * norm(self.r) > self.smallest:
            return Status.BREAKDOWN
        beta = ratio(rho * self.alpha, self.rho * self.omega, self.r) if self.rho else 0.0
        self.rho, self.p = rho, add(self.r, add(self.p, self.v, -self.omega), beta)
        y, self.v = self._product(self.p)
        overlap = dot(self.shadow, self.v)
        if status := _vanished(overlap, self.shadow, self.v):
            return status
        self.alpha = ratio(rho, overlap, self.r)
        self.d = add(self.d, y, self.alpha)
        self.r = add(self.r, self.v, -self.alpha)
        return None

    def second_half(self) -> Status | None:
        """The step ωMr that makes the residual smallest."""
        z, t = self._product(self.r)
        overlap = dot(t, self.r)
        if status := _vanished(overlap, t, self.r):
            return status
        self.omega = ratio(overlap, dot(t, t), t)
        self.d = add(self.d, z, self.omega)
        self.r = add(self.r, t, -self.omega)
        return None


def _vanished(overlap: float, x: Vector, y: Vector) -> Status | None:
    if not math.isfinite(overlap):
        return Status.NOT_FINITE
    return Status.BREAKDOWN if abs(overlap) <= torch.finfo(x[0].dtype).eps * norm(x) * norm(y) else None
