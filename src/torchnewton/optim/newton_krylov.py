"""The Newton-Krylov method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch.distributed as dist

from torchnewton.curvature import Halves, Hessian
from torchnewton.distributed import DataParallel
from torchnewton.globalization import ConstantDamping, TrustRegion
from torchnewton.optim.escape import SaddleEscape
from torchnewton.optim.newton import Newton
from torchnewton.optim.point import Curvature
from torchnewton.solvers import CG, Solver, SteihaugCG, UntilDisturbed


class NewtonKrylov(Newton):
    """Newton-Krylov: Hd = −g for the Hessian itself, ended at the first disturbing direction, in a trust region.

    1. A Krylov solver works on Hd = −g until its tolerance, the trust radius (CG), or the first direction p with
       pᵀHp ≤ ε‖p‖² or, with `disagreement`, on whose curvature the halves of the batch do not agree: see
       `UntilDisturbed` and `Halves`. The iterate so far is d; −g, as long as the model wants it, where there is none.
    2. Where d promises next to nothing and there is negative curvature, d follows that: see `SaddleEscape`.
    3. The error of the Taylor expansion chooses α and the next radius: see `TrustRegion`. There is no damping.

    `report.status` names why the Krylov loop ended, `report.radius` is the radius of the step.

    Args:
        params: parameters or parameter groups.
        curvature: `Hessian`, products by double backward (2 gradients); `ComplexStepHessian.of`, those of the paper by
            the complex step (8/3 gradients), which agree to rounding; any other curvature.
        solver: `CG(rtol=0.01, max_iterations=50)`, which runs as `SteihaugCG` within the radius; also
            `MINRES(stop_at_negative_curvature=True)`, `BiCGSTAB`, whose steps are shortened to it.
        epsilon: ε in units of the greatest curvature the loop has met.
        disagreement: the greatest difference of two halves' curvatures, relative to their sum, that a direction may
            have; 1 is where the curvature is as large as its standard error. It needs a loss that splits and two
            forward passes an iteration, more than it saved where it was measured: the default is no test.
        trust_region: `TrustRegion()`.
        escape: `SaddleEscape()`; None to stay with the Krylov loop.
        weight_decay, process_group: as for `Newton`.

    Source: Shen, Shao, Zhou, Jiang, Luo, Yang, "Second-order Neural Network Training Using Complex-step Directional
    Derivative", arXiv 2009.07098. Its abstract gives the idea of each part; ε and that the iterate is kept are
    recalled. The halves' test, the escape and every constant are ours, not published.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        curvature: Curvature = Hessian,
        solver: Solver | None = None,
        epsilon: float = 1e-6,
        disagreement: float | None = None,
        trust_region: TrustRegion | None = None,
        escape: SaddleEscape | None = SaddleEscape(),
        weight_decay: float = 0.0,
        process_group: DataParallel | dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            curvature=curvature if disagreement is None else Halves.of(curvature),
            solver=CG(rtol=0.01, max_iterations=50) if solver is None else solver,
            damping=ConstantDamping(0.0),
            trust_region=TrustRegion() if trust_region is None else trust_region,
            acceleration=None,
            escape=escape,
            weight_decay=weight_decay,
            process_group=process_group,
        )
        self.epsilon, self.disagreement = epsilon, disagreement
        UntilDisturbed(self.solver, epsilon, disagreement)  # refuses wrong arguments now

    def solver_at(self, num_steps: int) -> Solver:
        """The solver within the radius, ended at the first disturbing direction."""
        solver, radius = self.solver, self.radius
        if isinstance(solver, CG):
            shared = {f.name: getattr(solver, f.name) for f in fields(solver) if f.name != "keep"}
            solver = SteihaugCG(**shared, radius=radius)
        return UntilDisturbed(solver, self.epsilon, self.disagreement, radius)
