"""The Jacobian of the outputs from explicit layer factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchnewton.curvature.jacobian import Jacobian
from torchnewton.curvature.layer_jacobian.factors import Factors, explicit_layers, factorize
from torchnewton.curvature.layer_jacobian.layers import Layer
from torchnewton.record import Tape
from torchnewton.vectors import Vector, add_, num_entries


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
    def _explicit(self) -> tuple[list[Layer], set[int]]:
        return explicit_layers(self.tape)

    @property
    def layers(self) -> list[Layer]:
        """The layers that have a rule and whose parameters enter the outputs in such layers only."""
        return self._explicit[0]

    @property
    def expected_coverage(self) -> float:
        """The share of the parameters that these layers make up: `coverage`, unless samples turn out to be mixed."""
        return self._share(self._explicit[1])

    @cached_property
    def factors(self) -> Factors:
        """The layers' factors; the work of the first product."""
        return factorize(self.tape, *self._explicit, self.max_bytes)

    @property
    def coverage(self) -> float:
        """The share of the parameters that are explicit, from 0 to 1."""
        return self._share(self.factors.covered)

    def _share(self, covered: set[int]) -> float:
        chosen = [p for i, p in enumerate(self.tape.params) if i in covered]
        return num_entries(chosen) / max(num_entries(self.tape.params), 1)

    @property
    def path(self) -> str:
        """How products are made."""
        return f"explicit layer factors for {self.coverage:.0%} of the parameters"

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """Jv."""
        covered, groups = self.factors.covered, self.factors.groups
        u = [y for term in self.tape.terms for y in term.jacobian_product(self._rest(v))]
        chosen = {i: w if i in covered else torch.zeros_like(w) for i, w in enumerate(v)}
        moved: dict[Layer, Tensor] = {}
        for factor in self.factors.factors:
            layer, group = factor.layer, groups[factor.group]
            if layer not in moved:
                moved[layer] = layer.product(chosen)
            group.add(factor.product(moved[layer]), self.tape.of_term(u, group.term))
        return u

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """Jᵀu."""
        covered, groups = self.factors.covered, self.factors.groups
        deltas: dict[Layer, Tensor] = {}
        for factor in self.factors.factors:
            joined = groups[factor.group].join(self.tape.of_term(u, groups[factor.group].term))
            delta = factor.adjoint(joined)
            deltas[factor.layer] = deltas[factor.layer] + delta if factor.layer in deltas else delta
        total: dict[int, Tensor] = {}
        for layer, delta in deltas.items():
            for position, g in layer.adjoint(delta):
                if position in covered:
                    total[position] = total[position] + g if position in total else g
        found = [total[i].view_as(p) if i in total else torch.zeros_like(p) for i, p in enumerate(self.tape.params)]
        if len(covered) < len(found):
            for number, term in enumerate(self.tape.terms):
                add_(found, term.jacobian_adjoint(self.tape.of_term(u, number), self._rest(self.tape.params)))
        return found

    def _rest(self, v: Sequence[Tensor]) -> list[Tensor | None]:
        """What belongs to parameters that are not explicit."""
        return [None if i in self.factors.covered else w for i, w in enumerate(v)]
