"""Conjugate gradients within a trust region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from torchnewton.solvers.iteration import Iterative, accepted, initial_residual, product, ratio
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import add, add_, clone, dot, norm, scale, zeros_like


@dataclass(frozen=True)
class SteihaugCG(Iterative):
    """Conjugate gradients on ½xᵀAx − bᵀx within ‖x‖ ≤ `radius`, for symmetric A, definite or not.

    Stops as `CG` does, and on the boundary: where the path of CG leaves the region (`Status.BOUNDARY`), or in the
    direction of negative curvature that was met. The model falls and ‖x‖ grows with every iteration. With a
    preconditioner M ≈ A⁻¹ the norm is xᵀM⁻¹x. `x0` is shortened to the radius.

    Cost: one product and five inner products an iteration; memory: four vectors, five with a preconditioner.
    Errors: `ValueError` for `x0` with a preconditioner, since M⁻¹x₀ is not to be had.
    Source: Steihaug, SIAM J. Numer. Anal. 20, 1983; Conn, Gould and Toint, "Trust-region methods", algorithm 7.5.1.
    Deviation: M⁻¹p is carried along, instead of recurrences for the norms that lose digits.

    >>> A, b = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([0.0, 1.0])
    >>> SteihaugCG(radius=3.0).solve(A, [b]).solution
    [tensor([0., 3.])]
    """

    radius: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.radius < math.inf:
            raise ValueError(f"SteihaugCG: radius={self.radius} must be positive and finite.")

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        if x0 is not None and preconditioner is not None:
            raise ValueError("SteihaugCG: x0 and preconditioner exclude each other; leave one of them out.")
        if x0 is not None and norm(x0) > self.radius:
            x0 = scale(x0, self.radius / norm(x0))
        run = _Run(A, b, x0, preconditioner, self.radius)
        tolerance, model = self._tolerance(b), [0.0]
        status = Status.CONVERGED if norm(run.r0) <= tolerance else run.turn(0.0)
        while status is None:
            alpha, status = run.step_length()
            if status is Status.NOT_FINITE:
                break
            model.append(model[-1] + run.step(alpha))
            status = status or self._status(model, run.r, tolerance) or run.turn(run.rz)
        negative = run.p if status is Status.NEGATIVE_CURVATURE else None
        x, r, status = accepted(run.x, run.r, status, x0, run.r0)
        return SolveResult(x, r, norm(r), status, len(model) - 1, run.num_products, negative, "Steihaug CG")


class _Run:
    """The letters of CG, with q = M⁻¹p and xx = xᵀM⁻¹x."""

    def __init__(
        self, A: Operator, b: Sequence[Tensor], x0: Sequence[Tensor] | None, M: Operator | None, radius: float
    ) -> None:
        self.A, self.M, self.radius = A, M, radius
        self.num_products = int(x0 is not None)
        self.r0 = initial_residual(A, b, x0)
        self.x, self.r = zeros_like(b) if x0 is None else clone(x0), self.r0
        self.p = self.q = self.Ap = zeros_like(b)
        self.xx, self.xp, self.pp, self.pAp, self.rz = dot(self.x, self.x), 0.0, 0.0, 0.0, 0.0

    def turn(self, previous: float) -> Status | None:
        """The next direction p; `previous` is rᵀz of the last one, 0 at the start."""
        z = self.r if self.M is None else product(self.M, self.r)
        self.rz = dot(self.r, z)
        if not (math.isfinite(self.rz) and self.rz > 0):
            return Status.INDEFINITE_PRECONDITIONER if math.isfinite(self.rz) else Status.NOT_FINITE
        beta = ratio(self.rz, previous, self.r) if previous else 0.0
        self.p = add(z, self.p, beta)
        self.q = self.p if self.M is None else add(self.r, self.q, beta)
        return None

    def step_length(self) -> tuple[float, Status | None]:
        """That of CG, or that to the boundary and why."""
        self.Ap = product(self.A, self.p)
        self.num_products += 1
        self.pAp, self.xp, self.pp = dot(self.p, self.Ap), dot(self.x, self.q), dot(self.p, self.q)
        if not math.isfinite(self.pAp):
            return 0.0, Status.NOT_FINITE
        tau = _to_boundary(self.radius * self.radius - self.xx, self.xp, self.pp)
        boundary = ratio(tau, 1.0, self.r)
        if self.pAp <= 0:
            return boundary, Status.NEGATIVE_CURVATURE
        alpha = ratio(self.rz, self.pAp, self.r)
        return (alpha, None) if alpha < boundary else (boundary, Status.BOUNDARY)

    def step(self, alpha: float) -> float:
        """Go there; the change of the model."""
        add_(self.x, self.p, alpha)
        self.r = add(self.r, self.Ap, -alpha)
        self.xx += alpha * (2 * self.xp + alpha * self.pp)
        return -alpha * (self.rz - 0.5 * alpha * self.pAp)


def _to_boundary(gap: float, xp: float, pp: float) -> float:
    """The root τ ≥ 0 of ppτ² + 2xpτ = gap, without cancellation."""
    if not pp > 0:  # p, or its product with the preconditioner, is below what the dtype holds
        return math.inf
    gap = max(gap, 0.0)
    root = math.sqrt(xp * xp + pp * gap)
    return gap / (xp + root) if xp > 0 else (root - xp) / pp
