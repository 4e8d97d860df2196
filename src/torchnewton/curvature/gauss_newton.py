"""The generalized Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from torchnewton.costs import Costs
from torchnewton.curvature.dense import (
    SampleBlock,
    dense_from_blocks,
    dense_from_rows,
    factor_from_blocks,
    sample_blocks,
)
from torchnewton.curvature.jacobian import Jacobian
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import NotPerSampleError, Tape
from torchnewton.vectors import Vector

_CALL_FLOPS = 2e6  # what the overhead of one call costs, in operations


class GaussNewton(LinearOperator):
    """G = JᵀBJ, J = ∂z/∂θ and B = ∂²f/∂z² at the outputs z where the loss f = ℓ(z) was split.

    Shapes: P×P with P parameters; `G @ v` takes and gives a vector like the parameters.
    Cost: a product 4/3 of a gradient by the count of matrix products, nothing for B.
    Errors: `RecordError` when the loss has no split.
    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.

    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> tape = record(lambda: torch.nn.functional.mse_loss(x @ theta, torch.zeros(2), reduction="sum"), [theta])
    >>> GaussNewton(tape).to_dense()  # 2 xᵀx
    tensor([[4., 2.],
            [2., 2.]], dtype=torch.float64)
    """

    def __init__(self, tape: Tape, jacobian: Jacobian | None = None, *, per_sample: bool = True) -> None:
        convex = all(bool((piece.weight >= 0).all()) for piece in tape.pieces)
        super().__init__(tape.params, tape.params, is_symmetric=True, is_positive_semidefinite=convex)
        self.tape = tape
        self.jacobian = Jacobian(tape) if jacobian is None else jacobian
        self.per_sample = per_sample

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """J'(B(Jv))."""
        u = self.jacobian.apply(v)
        weighted: Vector = []
        for term in self.tape.terms:
            start = len(weighted)
            weighted += term.hessian_product(u[start : start + len(term.outputs)])
        return self.jacobian.adjoint(weighted)

    @cached_property
    def _blocks(self) -> list[SampleBlock] | None:
        if not self.per_sample:
            return None
        try:
            return sample_blocks(self.tape)
        except NotPerSampleError:
            self.per_sample = False
            return None

    @cached_property
    def _dense(self) -> Tensor:
        if self._blocks is None:
            return dense_from_rows(self.tape, self.jacobian)
        return dense_from_blocks(self._blocks)

    @cached_property
    def _factor(self) -> Tensor | None:
        if self._blocks is None or not self.is_positive_semidefinite:
            return None
        return factor_from_blocks(self._blocks)

    def factored(self) -> tuple[Tensor, float] | None:
        """R = B^½J, one row for each number the samples have in the outputs; None without per-sample rows."""
        return None if self._factor is None else (self._factor, 0.0)

    def to_dense(self) -> Tensor:
        """The matrix in float64, from the rows of J, never by P products; it is kept.

        Where the closure treats samples independently, the rows come from per-sample copies of the parameters: one
        more forward pass and a backward pass for each of the M numbers a sample has in the outputs. Otherwise every
        row of J takes its own backward pass. Memory: J (N·M·P numbers) and the matrix.
        """
        return self._dense

    def costs(self) -> Costs:
        """Product: 4/3 of a gradient, and `_CALL_FLOPS` for each layer call in four passes. Factor: the rows, a
        forward pass and for each output of a sample a backward pass. Dense: the rows and a symmetric product.
        """
        forward, calls = forward_flops(self.tape), len(self.tape.layer_calls)
        widths = [z.numel() // max(z.shape[0], 1) for z in self.tape.outputs if z.dim()]
        rows = sum(z.numel() for z in self.tape.outputs)
        factor = (2 + 4 * max(widths, default=0)) * forward
        return Costs(
            product=4 * (forward + _CALL_FLOPS * calls),
            dense=factor + float(rows) * self.shape[1] ** 2,
            factor=factor,
            factor_rows=rows,
        )

    def can_form_dense(self) -> bool:
        """Whether the rows come from per-sample copies."""
        return self._blocks is not None


def forward_flops(tape: Tape) -> float:
    """Operations of a forward pass: 2 · output entries · fan-in for each call of a layer with a weight."""
    total = 0.0
    for call in tape.layer_calls:
        for p in call.parameters:
            if p.dim() >= 2:
                total += 2.0 * call.output.numel() * (p.numel() // max(p.shape[0], 1))
    return total
