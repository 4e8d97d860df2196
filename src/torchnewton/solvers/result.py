"""What every solver returns, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from torchnewton.vectors import Vector, dot


class Status(Enum):
    """How a solve ended; the value is the sentence for the user."""

    CONVERGED = "the residual met the tolerance"
    PROGRESS = "the quadratic model stopped decreasing"
    MAX_ITERATIONS = "the iteration limit was reached"
    NEGATIVE_CURVATURE = "a direction of negative curvature was met"
    FLAT = "a direction of next to no curvature was met"
    QUORUM = "enough of the other ranks had finished their part"
    DISAGREEMENT = "the halves of the batch disagree on the curvature of a direction"
    NOT_POSITIVE_DEFINITE = "the matrix is not positive definite: raise the damping"
    BOUNDARY = "the boundary of the trust region was reached"
    LEAST_SQUARES = "the matrix is singular and the residual is the smallest there is"
    BREAKDOWN = "the recurrence broke down: start again from this iterate"
    INDEFINITE_PRECONDITIONER = "the preconditioner is not positive definite"
    NOT_SOLVED = "coefficients of earlier steps were used"
    NOT_FINITE = "a product with the curvature was not finite"


@dataclass(frozen=True)
class SolveResult:
    """The solution x of Ax = b as far as it was found, with its residual b − Ax and the norm of that, `residual_norm`.

    `status` says how the solve ended, after `num_iterations` iterations with `num_products` products with A. A solver
    that never forms the residual has None there and tells `curvature`, xᵀAx, instead. `negative_curvature` is a
    direction p with pᵀAp ≤ 0 where one was met. `method` names the solver, and the reason where one was chosen.
    `reuse` solves for another right-hand side with the same factorization, where there is one. `shifted` solves (A +
    δI)x = b likewise. `flops` counts the operations of dense linear algebra, rows of the Jacobian included; products
    are counted apart, and so are `num_evaluations` runs of the closure. `iterates` are earlier iterates x, each with
    its xᵀAx, among which the objective may choose. `coefficients` are those of x in the few directions of a solver
    that has such. `slope` is −bᵀx where the solver has b with more digits than it was given.
    """

    solution: Vector
    residual: Vector | None
    residual_norm: float
    status: Status
    num_iterations: int
    num_products: float = 0
    negative_curvature: Vector | None = None
    method: str = ""
    reuse: Callable[[Vector], Vector] | None = None
    shifted: Callable[[float], SolveResult] | None = None
    flops: float = 0.0
    curvature: float | None = None
    num_evaluations: int = 0
    iterates: Sequence[tuple[Vector, float]] = ()
    coefficients: tuple[float, ...] = ()
    slope: float | None = None

    def curved(self, slope: float) -> float:
        """xᵀAx, given −bᵀx: told by the solver, or from the residual b − Ax."""
        return (self.curvature or 0.0) if self.residual is None else -slope - dot(self.residual, self.solution)


class Operator(Protocol):
    """Anything with `A @ v`: an operator of `torchnewton.curvature`, or a plain matrix for flat vectors."""

    def __matmul__(self, v: Any, /) -> Any:
        """The product."""
        ...


@runtime_checkable
class UsesPreviousStep(Protocol):
    """A solver whose x₀ should be the previous step of the optimizer."""

    @property
    def uses_previous_step(self) -> bool:
        """Whether it does."""
        ...


def uses_previous_step(solver: Solver) -> bool:
    """Whether its x₀ should be the previous step; not where it does not say."""
    return isinstance(solver, UsesPreviousStep) and solver.uses_previous_step


class Solver(Protocol):
    """A frozen configuration that solves Ax = b."""

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """Solve Ax = b from x0 (default 0); `preconditioner @ r` approximates A⁻¹r."""
        ...
