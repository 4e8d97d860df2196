"""A Krylov loop that ends at the first disturbing direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from torchnewton.solvers.iteration import announce, initial_residual, product
from torchnewton.solvers.result import Operator, Solver, SolveResult, Status
from torchnewton.vectors import Vector, add, clone, dot, is_finite, norm, scale


@runtime_checkable
class KnowsDisagreement(Protocol):
    """An operator that knows how far two halves of its batch are apart."""

    def disagreement(self, p: Sequence[Tensor], curvature: float) -> float | None:
        """|q₁ − q₂| relative to pᵀAp = `curvature` > 0, root mean square over all halves; None where not known."""
        ...


@dataclass(frozen=True)
class UntilDisturbed:
    """Any Krylov solver, ended before the first direction p that disturbs it, with the iterate so far.

    Of the vectors that are multiplied with A, p disturbs where

        pᵀAp ≤ ε κ ‖p‖²,    ε = `epsilon`, κ the greatest pᵀAp / ‖p‖² so far, or
        |pᵀA₁p − pᵀA₂p| > `disagreement` · pᵀAp    for halves 1 and 2 of the batch (root mean square over all halves).

    The second test needs an operator that `KnowsDisagreement`, and is left out where it has no answer. Where p is the
    first direction, the solution is the part of it that the model wants: to the minimum along it, or to `radius`
    (‖b‖ where that is infinite) where its curvature is not positive. `negative_curvature` is p where pᵀAp < 0.

    The solver sees a product that is not finite, on which all of them end with the iterate so far. With CG the vectors
    are the search directions, with MINRES an orthogonal basis of the Krylov space.

    Cost: one inner product an iteration, and what the operator's test costs.
    Source: Shen et al., arXiv 2009.07098, for the idea; tests and constants are ours.

    >>> A, b = torch.diag(torch.tensor([2.0, 1.0, -1.0])), torch.tensor([2.0, 1.0, 0.5])
    >>> result = UntilDisturbed(CG()).solve(A, [b])
    >>> result.status.value, result.num_iterations
    ('a direction of negative curvature was met', 1)
    """

    solver: Solver
    epsilon: float = 1e-6
    disagreement: float | None = None
    radius: float = math.inf

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"UntilDisturbed: epsilon={self.epsilon} must not be negative.")
        if self.disagreement is not None and not self.disagreement > 0:
            raise ValueError(f"UntilDisturbed: disagreement={self.disagreement} must be positive, or None for no test.")
        if not self.radius > 0:
            raise ValueError(f"UntilDisturbed: radius={self.radius} must be positive.")

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`; from x0 the correction is solved for."""
        if x0 is not None:
            found = self.solve(A, initial_residual(A, b, x0), None, preconditioner)
            return replace(found, solution=add(x0, found.solution), num_products=found.num_products + 1)
        watch = _Watch(A, self)
        found = self.solver.solve(watch, b, None, preconditioner)
        if watch.status is not None:
            found = replace(found, status=watch.status)
            if norm(found.solution) == 0:
                found = self._first(found, watch, b)
        return replace(
            found,
            num_products=watch.num_products,
            num_evaluations=2 * watch.num_tests,
            negative_curvature=watch.negative if watch.negative is not None else found.negative_curvature,
            method=f"{found.method}, until disturbed",
        )

    def _first(self, found: SolveResult, watch: _Watch, b: Sequence[Tensor]) -> SolveResult:
        """The part of the first direction."""
        p, Ap, curvature = watch.p, watch.Ap, watch.curvature
        slope, length = dot(p, b), norm(p)
        along = math.inf if math.isinf(self.radius) else self.radius / length
        step = abs(slope) / curvature if curvature > 0 else math.inf
        step = math.copysign(min(step, along), slope)
        if math.isinf(step):
            step = math.copysign(norm(b) / length, slope)
        residual = add(b, Ap, -step)
        if not is_finite(residual):
            return found
        return replace(found, solution=scale(p, step), residual=residual, residual_norm=norm(residual))


class _Watch:
    """A as the solver sees it: from the disturbing direction on, products are infinite."""

    def __init__(self, A: Operator, rule: UntilDisturbed) -> None:
        self.A, self.rule = A, rule
        self.status: Status | None = None
        self.negative: Vector | None = None
        self.p: Vector = []
        self.Ap: Vector = []
        self.curvature = self.largest = 0.0
        self.num_products = self.num_tests = 0
        self._halves = None if rule.disagreement is None else find(A)

    def expect(self, num_products: int) -> None:
        """What the solver announces."""
        announce(self.A, num_products)

    def __matmul__(self, v: Any) -> Any:
        """Av, or infinity."""
        p = [v] if isinstance(v, Tensor) else list(v)
        if self.status is None:
            self.Ap = product(self.A, p)
            self.num_products += 1
            self.p, self.curvature = p, dot(p, self.Ap)
            if not (math.isfinite(self.curvature) and is_finite(self.Ap)):
                return self.Ap[0] if isinstance(v, Tensor) else self.Ap
            self.status = self._judge(dot(p, p))
        if self.status is None:
            return self.Ap[0] if isinstance(v, Tensor) else self.Ap
        if self.curvature < 0 and self.negative is None:
            self.negative = clone(p)
        refused = [torch.full_like(x, math.inf) for x in p]
        return refused[0] if isinstance(v, Tensor) else refused

    def _judge(self, squared: float) -> Status | None:
        if squared == 0:
            return None
        quotient = self.curvature / squared
        if quotient <= self.rule.epsilon * self.largest:
            return Status.NEGATIVE_CURVATURE if quotient < 0 else Status.FLAT
        self.largest = max(self.largest, quotient)
        if self._halves is None or self.rule.disagreement is None:
            return None
        found = self._halves.disagreement(self.p, self.curvature)
        self.num_tests += found is not None
        return Status.DISAGREEMENT if found is not None and found > self.rule.disagreement else None


def find(A: Any) -> KnowsDisagreement | None:
    """The part of a shifted or summed operator that knows."""
    if isinstance(A, KnowsDisagreement):
        return A
    parts = (find(part) for part in getattr(A, "parts", ()))
    return next((part for part in parts if part is not None), None)
