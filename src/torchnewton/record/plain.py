"""The gradient of a closure as a training loop computes it, with nothing recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchnewton.record.graph import filled
from torchnewton.record.replay import Closure
from torchnewton.vectors import Vector


def plain_gradient(closure: Closure, params: Sequence[Tensor]) -> tuple[Any, Vector]:
    """What the closure returns, and ∇f, left in `param.grad`.

    Whether the closure calls `backward` itself or returns the loss alone is seen from `param.grad`. For closures whose
    returned loss is all that they differentiate: `record` tells.

    Cost: one gradient, with the kernels that a training loop would use; the closure's buffers move once.
    """
    for p in params:
        p.grad = None
    with torch.enable_grad():
        returned = closure()
    if any(p.grad is not None for p in params):
        return returned, filled([p.grad for p in params], params)
    found = torch.autograd.grad(returned, list(params), allow_unused=True)
    return returned, filled(found, params)
