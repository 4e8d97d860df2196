"""The Jacobian of the outputs from explicit layer factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchnewton.curvature.jacobian import Jacobian
from torchnewton.curvature.layer_jacobian.cut import Users, smallest_behind
from torchnewton.curvature.layer_jacobian.factors import Factors, explicit_layers, users_of
from torchnewton.curvature.layer_jacobian.layers import Layer
from torchnewton.record import Tape
from torchnewton.vectors import Vector, num_entries


class LayerJacobian(Jacobian):
    """J = ∂z/∂θ from layer inputs a and the cotangents D = ∂z/∂s of every output of a sample at every layer output s.

        Jv = Σ_layers D · call(x; v),   Jᵀu = Σ_layers (Dᵀu) aᵀ

    Two matrix products a layer for Jv and Jᵀu together, layers in any order: where a gradient has three and kept double
    backward four. Linear, convolution, embedding and normalization layers are explicit, used once or several times.
    Parameters that enter the outputs elsewhere too (as BatchNorm in training mode makes them, or a derivative inside
    the loss), and layers whose cotangents do not fit into `max_bytes`, go by kept double backward; `coverage` is the
    share of the parameters that are explicit, `path` says it in words.

    Cost: M backward passes of a third of a gradient each at the first product, M the numbers a sample has in the
    outputs; then two thirds of a gradient for Jv and Jᵀu together.
    Memory: N·M numbers for every entry of a sample's layer outputs, counted after pooling where a ReLU or a max-pooling
    follows; at most `max_bytes`.
    Source: Wang, Tan, Lin, "Newton Methods for Convolutional Neural Networks", arXiv 1811.06100, section 3.
    """

    def __init__(self, tape: Tape, max_bytes: float = 2e9) -> None:
        super().__init__(tape)
        self.max_bytes = max_bytes

    @cached_property
    def explicit(self) -> tuple[list[Layer], set[int]]:
        """The layers that have a rule, and the positions of parameters that enter the outputs only there."""
        return explicit_layers(self.tape, self.users)

    @property
    def layers(self) -> list[Layer]:
        """The layers that have a rule."""
        return self.explicit[0]

    @property
    def expected_coverage(self) -> float:
        """The share of the parameters that these layers make up: `coverage`, unless samples turn out to be mixed."""
        return self.share_of(self.explicit[1])

    @cached_property
    def users(self) -> Users:
        """Who takes what in the graph behind the outputs."""
        return users_of(self.tape)

    def entries_at_cut(self, layer: Layer) -> int:
        """The entries, over all samples, of the tensor at which the layer's cotangents will probably be kept."""
        return smallest_behind(layer.call.edge, layer.output_shape, self.users, self.tape.sizes).shape.numel()

    @cached_property
    def factors(self) -> Factors:
        """The layers' factors; the work of the first product."""
        factors = Factors(self.tape, *self.explicit, self.max_bytes, users=self.users)
        factors.compress()
        return factors

    @property
    def coverage(self) -> float:
        """The share of the parameters that are explicit, from 0 to 1."""
        return self.share_of(self.factors.covered)

    def share_of(self, covered: set[int]) -> float:
        """The share of the parameters at these positions."""
        chosen = [p for i, p in enumerate(self.tape.params) if i in covered]
        return num_entries(chosen) / max(num_entries(self.tape.params), 1)

    @property
    def gradients_per_product(self) -> float:
        """2/3 for what is explicit."""
        return 4 / 3 - 2 / 3 * self.coverage

    @property
    def path(self) -> str:
        """How products are made."""
        return f"explicit layer factors for {self.coverage:.0%} of the parameters"

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """Jv."""
        if not self.factors.covered:
            return super().apply(v)
        u = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in self.tape.outputs]
        for group, part in zip(self.factors.groups, self.factors.product(v), strict=True):
            group.add(part, self.tape.of_term(u, group.term))
        return u

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """Jᵀu."""
        if not self.factors.covered:
            return super().adjoint(u)
        return self.factors.adjoint([group.join(self.tape.of_term(u, group.term)) for group in self.factors.groups])
