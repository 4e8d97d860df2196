"""A step that also goes along negative curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from torchnewton.solvers.iteration import initial_residual, product
from torchnewton.solvers.result import Operator, Solver, SolveResult, Status
from torchnewton.vectors import Vector, add, dot, norm, scale


@dataclass(frozen=True)
class AlongNegativeCurvature:
    """Any solver for indefinite A; a direction p of negative curvature that it has met is added to its solution d.

        x = ±d + p,    signs such that bᵀd ≥ 0 and bᵀp ≥ 0,    ‖p‖ = ‖d‖, or ‖b‖ where d = 0

    p is left out where the model ½xᵀAx − bᵀx would be higher with it: where ½pᵀAp ≥ pᵀr, r = b − Ad. The solution of
    an indefinite system may point uphill, hence its sign. `status` says where p was taken.

    Cost: two inner products; one product where p was met. Memory: two vectors.
    Source: He et al., "Large Scale Distributed Hessian-Free Optimization for Deep Neural Network", arXiv 1606.00511;
    the sign of p is recalled, its length and the test are ours.

    >>> A, b = torch.diag(torch.tensor([2.0, -1.0])), torch.tensor([1.0, 2.0])
    >>> AlongNegativeCurvature(BiCGSTAB()).solve(A, [b]).status.value
    'a direction of negative curvature was met'
    """

    solver: Solver

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        found = self.solver.solve(A, b, x0, preconditioner)
        if found.status is Status.NOT_FINITE:
            return found
        d, products = found.solution, found.num_products
        r = found.residual
        if r is None:
            r, products = initial_residual(A, b, d), products + 1
        if dot(b, d) < 0:
            d, r = scale(d, -1.0), add(scale(b, 2.0), r, -1.0)
        p, status = found.negative_curvature, found.status
        if p is not None:
            p = _signed(p, b, norm(d) or norm(b))
            Ap, products = product(A, p), products + 1
            if 0.5 * dot(p, Ap) < dot(p, r):
                d, r, status = add(d, p), add(r, Ap, -1.0), Status.NEGATIVE_CURVATURE
        return replace(
            found,
            solution=d,
            residual=r,
            residual_norm=norm(r),
            status=status,
            num_products=products,
            negative_curvature=p,
            method=f"{found.method}, along negative curvature",
        )


def _signed(p: Vector, b: Sequence[Tensor], length: float) -> Vector:
    size = norm(p)
    return scale(p, (-1.0 if dot(b, p) < 0 else 1.0) * length / size) if size else p
