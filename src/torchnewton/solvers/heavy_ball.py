"""The step of gradient descent with momentum: no system is solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from torchnewton.solvers.iteration import product
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import add_, scale


@dataclass(frozen=True)
class HeavyBall:
    """x = αMb + μx₀ with α the `step_length` and μ the `momentum`, as if x₀ had been the last step: A is not asked.

    Cost: a product with M. The residual and the curvature stay unknown.
    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.

    >>> import torch
    >>> HeavyBall(0.5, 0.9).solve(torch.eye(1), [torch.ones(1)], [torch.ones(1)]).solution
    [tensor([1.4000])]
    """

    step_length: float
    momentum: float

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        x = scale(b if preconditioner is None else product(preconditioner, b), self.step_length)
        if x0 is not None:
            add_(x, x0, self.momentum)
        return SolveResult(x, None, math.nan, Status.NOT_SOLVED, 0, method="heavy ball")

    @property
    def uses_previous_step(self) -> bool:
        """Whether x₀ should be the previous step."""
        return True
