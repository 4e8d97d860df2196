"""The stochastic generalized Gauss-Newton method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from torchnewton.curvature import Diagonal
from torchnewton.distributed import DataParallel
from torchnewton.globalization import Armijo, LevenbergMarquardt
from torchnewton.optim.newton import Newton
from torchnewton.solvers import CG, MaxNorm, Operator, Solver
from torchnewton.vectors import Vector


class SGN(Newton):
    """SGN: CG on (G + λI)d = −m̂, with a trust-region rule for λ and backtracking, on one mini-batch a step.

    m̂ is the bias-corrected running average of the gradients (`momentum` β = 0 in all published runs). CG starts at 0
    and stops at max|r| ≤ 1e-6 or after `max_iterations` iterations; the first nine steps take ten. The reduction ratio
    is that of the full step against the damped model ½(r + g)ᵀd; λ grows by 3/2 below ¼ and shrinks by 2/3 above ¾, not
    below `min_damping`. At most ten halvings, until f(θ + αd) ≤ f(θ) + 1e-4·m̂ᵀd; the last one is taken.

    λ starts at `damping`. `preconditioner_exponent` α, where given, preconditions CG by 1/(m̂² + λ)^α.
    `weight_decay` and `process_group` are as for `Newton`.

    Published runs take 1,000 samples a step. Cost: one gradient, 4/3 for each CG iteration, 1/3 for each evaluation.
    Source: Gargiani, Zanelli, Diehl, Hutter, "On the Promise of the Stochastic Generalized Gauss-Newton Method for
    Training DNNs", arXiv 2006.02409, and its code.
    Deviations: products by kept double backward instead of forward mode (the same numbers); a step that is not finite
    is rejected.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        max_iterations: int = 10,
        damping: float = 1e-4,
        min_damping: float = 1e-6,
        momentum: float = 0.0,
        preconditioner_exponent: float | None = None,
        weight_decay: float = 0.0,
        process_group: DataParallel | dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            solver=_cg(max_iterations),
            damping=LevenbergMarquardt(initial=damping, minimum=min_damping, damped_model=True, full_step=True),
            line_search=Armijo(scale_slope=False, accept_last=True),
            momentum=momentum,
            acceleration=None,
            weight_decay=weight_decay,
            process_group=process_group,
        )
        self.preconditioner_exponent = preconditioner_exponent

    def solver_at(self, num_steps: int) -> Solver:
        """Ten CG iterations in the first nine steps."""
        return _cg(10) if num_steps < 9 else self.solver

    def inverse_at(self, gradient: Vector, damping: float) -> Operator | None:
        """1/(m̂² + λ)^α."""
        if self.preconditioner_exponent is None:
            return None
        return Diagonal([(g * g + damping).pow(-self.preconditioner_exponent) for g in gradient])


def _cg(max_iterations: int) -> CG:
    return CG(rtol=0.0, max_iterations=max_iterations, stop=MaxNorm(1e-6))
