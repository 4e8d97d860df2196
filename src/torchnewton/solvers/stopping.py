"""When an iterative solve has done enough, beside the residual tolerance every solver has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from torchnewton.solvers.result import Status
from torchnewton.vectors import max_abs


class StoppingRule(Protocol):
    """Looks at the quadratic model ½xᵀAx − bᵀx after each iteration (from 0) and at the residual."""

    def check(self, model: Sequence[float], residual: Sequence[Tensor]) -> Status | None:
        """The status to stop with, or None to go on."""
        ...


@dataclass(frozen=True)
class MaxNorm:
    """Stop at max|b − Ax| ≤ `tolerance`."""

    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"MaxNorm: tolerance={self.tolerance} must not be negative.")

    def check(self, model: Sequence[float], residual: Sequence[Tensor]) -> Status | None:
        """See `StoppingRule.check`."""
        return Status.CONVERGED if max_abs(residual) <= self.tolerance else None


@dataclass(frozen=True)
class MartensProgress:
    """Stop when the model's relative progress per iteration, over the last k iterations, is below `tolerance`.

    k = max(`window`, `share` · i) at iteration i: (q_i − q_{i−k}) / q_i < k · tolerance.
    Source: Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 4.4, with its constants.
    """

    tolerance: float = 5e-4
    window: int = 10
    share: float = 0.1

    def __post_init__(self) -> None:
        if not (self.tolerance >= 0 and self.window >= 1 and self.share >= 0):
            raise ValueError(
                f"MartensProgress: tolerance={self.tolerance} and share={self.share} must not be negative, "
                f"window={self.window} at least 1."
            )

    def check(self, model: Sequence[float], residual: Sequence[Tensor]) -> Status | None:
        """See `StoppingRule.check`."""
        iteration = len(model) - 1
        k = max(self.window, math.ceil(self.share * iteration))
        if iteration <= k or model[-1] >= 0:
            return None
        return Status.PROGRESS if (model[-1] - model[-1 - k]) / model[-1] < k * self.tolerance else None
