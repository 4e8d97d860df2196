"""The Jacobian of the outputs by kept double backward: any graph, nothing stored per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import Tape
from torchnewton.vectors import Vector, add, flatten


class Jacobian(LinearOperator):
    """J = ∂z/∂θ of the outputs z of a tape, with `J @ v` and `J.adjoint(u)` = Jᵀu.

    The tape keeps h(u) = Jᵀu with its graph in u. h is linear, so Jv is the derivative of ⟨h(u), v⟩ in u: one
    backward pass over the graph of the backward pass.

    Shapes: `J @ v` takes a vector like the parameters and gives one tensor per output.
    Cost: `J @ v` and `J.adjoint(u)` two thirds of a gradient each (two matrix products a layer, a gradient has three).
    Errors: `RecordError` when the loss has no split, or for an operation that has no second derivative.
    """

    def __init__(self, tape: Tape) -> None:
        tape.require_split()
        super().__init__(tape.params, tape.outputs)
        self.tape = tape

    @property
    def gradients_per_product(self) -> float:
        """What Jv and Jᵀu cost together."""
        return 4 / 3

    @property
    def path(self) -> str:
        """How products are made."""
        return "kept double backward"

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """Jv."""
        return [y for term in self.tape.terms for y in term.jacobian_product(v)]

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """Jᵀu."""
        total: Vector = []
        for number, term in enumerate(self.tape.terms):
            found = term.jacobian_adjoint(self.tape.of_term(u, number))
            total = add(total, found) if total else found
        return total

    def to_dense(self) -> Tensor:
        """The matrix, one backward pass a row."""
        rows = []
        for i, z in enumerate(self.codomain):
            for j in range(z.numel()):
                u = [torch.zeros(y.shape, dtype=y.dtype, device=y.device) for y in self.codomain]
                u[i].view(-1)[j] = 1
                rows.append(flatten(self.adjoint(u)))
        return torch.stack(rows)
