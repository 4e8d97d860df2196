"""What one optimizer step did, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class StepReport:
    """The numbers of the last step, as `optimizer.report`; what a step has not come to stays at its default.

    Where it began: `loss` is f before the step, as the closure returned it, without `weight_decay`; `gradient_norm` is
    ‖g‖, g that of the objective with it. `damping` is the λ that the step was solved with, in absolute units, `radius`
    its trust radius, NaN without one. `regime` is "exact" or "plane" where `Newton` chooses, see `RegimeChoice`.

    How it was solved: `solver` names the solver, and the reason where one was chosen, `jacobian` how products with the
    Gauss-Newton matrix were made, if any. `inner_iterations` counts iterations of the solver, `products` those with the
    curvature, `loss_evaluations` runs of the closure at trial points.

    What came of it: `accepted` says whether the parameters have moved, `step_length` is α in θ + αd. `status` is a
    sentence: how the solve ended, or why there was no step. The reductions are those of the objective with
    `weight_decay`; `reduction_ratio` is `actual_reduction` over `predicted_reduction`, NaN where no step was judged, as
    in gliding steps.

    What it cost: `gradient_equivalents` counts the step's work in gradients of the same batch: a forward pass is 1/3, a
    backward pass 2/3, a product 4/3 (of the Hessian 2, by the complex step 8/3), and the dense linear algebra of an
    exact solve its floating-point operations over the 6NP of a gradient of a dense network with P parameters on N
    samples. Beside the passes through the network a preconditioner's own algebra (factors, eigenpairs, products with a
    vector) is not counted. `bytes_communicated` is what this process has put into `messages` exchanges with others.
    `seconds` are wall-clock seconds of the parts `record`, `solve` and `search`.

    A method that is no Newton step uses what it has of these: see its class.
    """

    loss: float = math.nan
    gradient_norm: float = math.nan
    damping: float = math.nan
    radius: float = math.nan
    actual_reduction: float = math.nan
    predicted_reduction: float = math.nan
    reduction_ratio: float = math.nan
    step_length: float = 0.0
    inner_iterations: int = 0
    accepted: bool = False
    status: str = ""
    regime: str = ""
    solver: str = ""
    jacobian: str = ""
    loss_evaluations: int = 0
    products: float = 0
    gradient_equivalents: float = 0.0
    bytes_communicated: int = 0
    messages: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
