"""Newton-CG with a subsampled Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from torchnewton.distributed import DataParallel
from torchnewton.globalization import Armijo, Damping, LevenbergMarquardt
from torchnewton.optim.arguments import as_rule
from torchnewton.optim.newton import Newton
from torchnewton.solvers import CG


class NewtonCG(Newton):
    """Newton-CG: CG on (G + λI)d = −g, the gradient of all data, the Gauss-Newton matrix G of a part of them.

        data = tn.over(torch.arange(len(x)).split(1024), loss_of_indices)
        subsets = tn.Subsets(len(x), fraction=0.05)
        optimizer.step(data, curvature=tn.over(next(subsets).split(1024), loss_of_indices))

    CG starts at 0 and stops at ‖r‖ ≤ `rtol`·‖g‖ or after `max_iterations`. The line search on the objective of all data
    halves α from 1 until f(θ + αd) − f(θ) ≤ `sufficient_decrease`·α·gᵀd. The predicted reduction −αgᵀd − ½α²dᵀGd leaves
    λ out; the residual r of CG gives it without a product, dᵀGd = dᵀ(−g − r − λd). λ grows by 3/2 where ρ < ¼ and
    shrinks by 2/3 where ρ > ¾.

    `damping` is the first λ, or another rule than this one; `weight_decay` and `process_group` are as for `Newton`.

    Its objective ‖θ‖²/(2Cl) + (1/l) Σ‖z − y‖² over l samples, C = 0.01, is `weight_decay` = 1/(Cl) with the squared
    error summed over the classes.

    Cost: one gradient of all data and 1/3 for each evaluation; for each CG iteration 7/3 of a gradient of the subset,
    or 4/3 and less where it fits into one batch, whose graph is kept. Memory: that of one batch, see `over`.
    Source: Wang, Tan, Lin, "Newton Methods for Convolutional Neural Networks", arXiv 1811.06100, and its code simpleNN.
    Deviations: at most `max_halvings` halvings, after which the step is refused and λ raised, where simpleNN goes on
    for ever; a step that is not finite is rejected.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        damping: float | Damping = 1.0,
        rtol: float = 0.1,
        max_iterations: int = 250,
        sufficient_decrease: float = 1e-4,
        max_halvings: int = 20,
        weight_decay: float = 0.0,
        process_group: DataParallel | dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            solver=CG(rtol=rtol, max_iterations=max_iterations),
            damping=as_rule(damping, LevenbergMarquardt),
            line_search=Armijo(decrease=sufficient_decrease, max_halvings=max_halvings),
            acceleration=None,
            weight_decay=weight_decay,
            process_group=process_group,
        )
