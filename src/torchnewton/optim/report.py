"""What one optimizer step did, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class StepReport:
    """The numbers of the last step, as `optimizer.report`.

    `loss` is f before the step, as the closure returned it, without `weight_decay`; the reductions are those of
    the objective with it. `reduction_ratio` is `actual_reduction / predicted_reduction`, NaN where no step was
    judged. `radius` is the trust radius of the step, NaN without one. `gradient_equivalents` counts the step's work in
    gradients of the same batch: a forward pass is 1/3, a backward pass 2/3, a product 4/3 (of the Hessian 2, by the
    complex step 8/3), and the dense linear algebra of an exact solve its floating-point operations over the 6NP of a
    gradient of a dense network with P parameters on N samples. Beside the passes through the network a preconditioner's
    own algebra (factors, eigenpairs, products with a vector) is not counted. `bytes_communicated` is what this process
    has put into `messages` exchanges with others. `seconds` are wall-clock seconds of the parts
    `record`, `solve` and `search`.
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
