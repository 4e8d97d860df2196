"""The Hessian-free method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from torchnewton.curvature import GaussNewton, Hessian
from torchnewton.distributed import DataParallel
from torchnewton.globalization import Armijo, Damping, LevenbergMarquardt
from torchnewton.optim.arguments import as_rule
from torchnewton.optim.newton import Newton
from torchnewton.optim.point import Curvature
from torchnewton.solvers import CG, AlongNegativeCurvature, BiCGSTAB, MartensProgress, Solver, WarmStart


class HessianFree(Newton):
    """Hessian-free optimization with negative curvature, or, with the Gauss-Newton matrix, as Martens has it.

        tn.HessianFree(params)                                 # He et al.: BiCGSTAB on (H + λI)d = −g
        tn.HessianFree(params, curvature=tn.GaussNewton)       # Martens: CG on (G + λI)d = −g

    With the Hessian, which is indefinite, a direction of negative curvature that BiCGSTAB has met is added to its
    solution: see `AlongNegativeCurvature`. With the Gauss-Newton matrix CG starts from 0.95 times the last step, ends
    when the model no longer falls (`MartensProgress`), and goes back to an earlier iterate as long as the objective
    falls there (`CG(keep=1.3)`). In both, f(θ + αd) ≤ f(θ) + 1e-4·α·gᵀd is reached by halving α, and λ grows by 3/2
    where ρ < ¼ and shrinks by 2/3 where ρ > ¾.

    The samples may be spread over processes: see `process_group`. Every product is one message then.

    Args:
        params: parameters or parameter groups.
        curvature: `Hessian`, products of 2 gradients; `GaussNewton`, of 4/3; any other is treated as indefinite.
        solver: `WarmStart(CG(…))` for `GaussNewton`, `AlongNegativeCurvature(BiCGSTAB(…))` else.
        damping: λ at the start, or another rule than this one.
        max_iterations: the limit of these two solvers, 50; BiCGSTAB takes two products an iteration. Not with `solver`,
            which has its own.
        weight_decay, process_group: as for `Newton`.

    Source: He, Mudigere, Smelyanskiy, Takáč, "Large Scale Distributed Hessian-Free Optimization for Deep Neural
    Network", arXiv 1606.00511: its abstract gives BiCGSTAB on H and the use of negative curvature; how p is combined
    and the rule for λ are recalled, not checked. Martens, "Deep learning via Hessian-free optimization", ICML 2010, of
    which γ = 1.3 and the decay 0.95 are recalled.
    Deviations: λ starts at 1 and the tolerance of BiCGSTAB is 0.1, not published; no preconditioner in Martens'
    variant; the warm start is the step as it was made.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        curvature: Curvature = Hessian,
        solver: Solver | None = None,
        damping: float | Damping = 1.0,
        max_iterations: int | None = None,
        weight_decay: float = 0.0,
        process_group: DataParallel | dist.ProcessGroup | None = None,
    ) -> None:
        if solver is not None and max_iterations is not None:
            raise ValueError(
                f"HessianFree: max_iterations={max_iterations} is not that of solver={solver}: say it there."
            )
        if solver is None:
            make = _martens_cg if curvature is GaussNewton else _bicgstab
            solver = make(50 if max_iterations is None else max_iterations)
        super().__init__(
            params,
            curvature=curvature,
            solver=solver,
            damping=as_rule(damping, LevenbergMarquardt),
            line_search=Armijo(decrease=1e-4),
            acceleration=None,
            weight_decay=weight_decay,
            process_group=process_group,
        )


def _bicgstab(max_iterations: int) -> Solver:
    return AlongNegativeCurvature(BiCGSTAB(rtol=0.1, max_iterations=max_iterations))


def _martens_cg(max_iterations: int) -> Solver:
    return WarmStart(CG(rtol=0.0, max_iterations=max_iterations, stop=MartensProgress(), keep=1.3))
