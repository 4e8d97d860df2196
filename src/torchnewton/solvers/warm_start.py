"""A solve that begins where the last one has led."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchnewton.solvers.result import Operator, Solver, SolveResult
from torchnewton.vectors import scale


@dataclass(frozen=True)
class WarmStart:
    """Any iterative solver, started from `decay` times the optimizer's previous step.

    Cost: one product more. Source: Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 4.5; the
    decay is recalled. Deviation: the step as the line search has shortened it, not the solution before that.
    """

    solver: Solver
    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"WarmStart: decay={self.decay} must be positive and at most 1.")

    @property
    def uses_previous_step(self) -> bool:
        """x₀ is the previous step."""
        return True

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        return self.solver.solve(A, b, None if x0 is None else scale(x0, self.decay), preconditioner)
