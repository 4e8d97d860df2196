"""The Hessian by double backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchnewton import vectors
from torchnewton.costs import Costs
from torchnewton.curvature.cost_model import CALL
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import Tape
from torchnewton.vectors import Vector


class Hessian(LinearOperator):
    """H = ∇²f, of any loss: one that splits or does not, with penalties, several backward calls, any weights.

    The gradient g is kept with its graph in θ; Hv is the derivative of ⟨g, v⟩ in θ.

    Shapes: P×P with P parameters. Symmetric; indefinite unless f is convex in θ.
    Cost: the graph of g one backward pass, when the first product asks for it; then a product 2 gradients by the count
    of matrix products (6 a layer, a gradient has 3). Memory: about as much again as the graph of the loss. A
    `record(closure, params, create_graph=False)` leaves out what `GaussNewton` would need.
    Errors: `RecordError` for an operation that has no second derivative.
    Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994; here by two reverse passes.

    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> tape = record(lambda: theta[0] ** 2 * theta[1], [theta])
    >>> Hessian(tape).to_dense()  # [[2 θ₂, 2 θ₁], [2 θ₁, 0]]
    tensor([[4., 2.],
            [2., 0.]])
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape.params, tape.params, is_symmetric=True)
        self.tape = tape

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """∂⟨g, v⟩/∂θ."""
        total = vectors.zeros_like(self.domain)
        for term in self.tape.terms:
            vectors.add_(total, term.gradient_product(v))
        return total

    @property
    def covers_whole_loss(self) -> bool:
        """True."""
        return True

    @property
    def gradients_per_product(self) -> float:
        """Two: six matrix products a layer, a gradient has three."""
        return 2.0

    def costs(self, num_products: int = 1) -> Costs:
        """Product: two gradients. Dense: one product a column."""
        product = 6 * (self.tape.forward_flops + CALL * len(self.tape.layer_calls))
        return Costs(product=product, dense=product * self.shape[1])
