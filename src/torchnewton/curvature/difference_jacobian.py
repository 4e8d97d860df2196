"""The Jacobian of the outputs by differences: one forward pass a product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchnewton.curvature.jacobian import Jacobian
from torchnewton.record import UNDEFINED, moved
from torchnewton.vectors import Vector, norm


class DifferenceJacobian(Jacobian):
    """Jv ≈ (z(θ + hv) − z(θ)) / h with h = √ε·max(1, ‖θ‖) / ‖v‖; `adjoint` is exact.

    For the few products of a `Plane`, where an error of √ε in the curvature moves nothing: with
    `curvature=lambda tape: GaussNewton(tape, DifferenceJacobian(tape))` a step keeps no second graph.

    Cost: a product a forward pass, a third of a gradient. Memory: one vector like the parameters.
    Accuracy: √ε of the dtype, relative to z and its curvature along v; NaN where the closure raises at θ + hv. Errors:
    `RecordError` when the loss has no split.
    """

    @property
    def gradients_per_product(self) -> float:
        """A third for each of two Jv: what a plane asks for."""
        return 2 / 3

    @property
    def path(self) -> str:
        """How products are made."""
        return "differences of outputs"

    @cached_property
    def _size(self) -> float:
        return norm([p.detach() for p in self.tape.params])

    @torch.no_grad()
    def apply(self, v: Sequence[Tensor]) -> Vector:
        """Jv."""
        params, size = self.tape.params, norm(v)
        if size == 0:
            return [torch.zeros_like(z) for z in self.tape.outputs]
        h = torch.finfo(params[0].dtype).eps ** 0.5 * max(1.0, self._size) / size
        try:
            with moved(params, v, h):
                ahead = self.tape.evaluate_outputs()
        except UNDEFINED:
            return [torch.full_like(z, torch.nan) for z in self.tape.outputs]
        pairs = zip(ahead, (z.detach() for z in self.tape.outputs), strict=True)
        return [((a - z) / h).masked_fill_(a == z, 0.0) for a, z in pairs]  # also where both are −∞, as in a mask
