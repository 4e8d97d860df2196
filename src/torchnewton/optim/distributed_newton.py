"""The distributed Newton method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from torchnewton.distributed import DataParallel, Diagonalized, Quorum
from torchnewton.globalization import Armijo, Damping, LevenbergMarquardt
from torchnewton.optim.arguments import as_rule
from torchnewton.optim.newton import Newton
from torchnewton.solvers import CG


class DistributedNewton(Newton):
    """Newton's method with a solve that exchanges nothing: every rank solves for its own block of the parameters.

        optimizer = tn.DistributedNewton(model.parameters(), process_group=dist.group.WORLD)
        optimizer.step(closure)                          # each rank with its own samples
        optimizer.step(closure, curvature=subset)        # the Gauss-Newton matrix of few samples

    1. g is the gradient of the samples of all ranks: one message of P numbers.
    2. Rank p solves (λI + Gₚₚ)dₚ = −gₚ by CG, to ‖r‖ ≤ `rtol`·‖gₚ‖ or `max_iterations`: no message, unless there is a
       `quorum`, which ends the solve where the other ranks are done. See `Diagonalized`.
    3. d ← β₁d + β₂·(previous step), minimizing the quadratic model with the whole G: see `combine`.
    4. Backtracking and the rule for λ are those of `NewtonCG`: λ grows by 3/2 where ρ < ¼, shrinks by 2/3 where ρ > ¾.

    With one process, or one rank, and `combine=False` it is `NewtonCG`. `report.solver` says how many iterations every
    rank has made and how many bytes were exchanged in them, `report.bytes_communicated` what the step has exchanged.

    Args:
        params: parameters or parameter groups.
        damping: λ at the start, or another rule than this one.
        rtol, max_iterations: of every rank's CG.
        combine: whether the second direction is used.
        quorum: `Quorum(share, min_iterations)`; none.
        weight_decay, process_group: as for `Newton`.

    Source: Wang, Tan, Chen, Yuan, Keerthi, Mahajan, Sundararajan, Lin, "Distributed Newton Methods for Deep Neural
    Networks", arXiv 1802.00130: its abstract gives diagonalization, subsampling and the early end; the second direction
    and all constants are recalled, not checked. Deviations: those of `Diagonalized` and `NewtonCG`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        damping: float | Damping = 1.0,
        rtol: float = 0.1,
        max_iterations: int = 250,
        combine: bool = True,
        quorum: Quorum | None = None,
        weight_decay: float = 0.0,
        process_group: DataParallel | dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            solver=Diagonalized(CG(rtol=rtol, max_iterations=max_iterations), combine, quorum),
            damping=as_rule(damping, LevenbergMarquardt),
            line_search=Armijo(decrease=1e-4, max_halvings=20),
            acceleration=None,
            weight_decay=weight_decay,
            process_group=process_group,
        )
