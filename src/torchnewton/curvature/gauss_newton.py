"""The generalized Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchnewton.costs import Costs
from torchnewton.curvature.cost_model import gauss_newton_costs
from torchnewton.curvature.dense import dense_from_rows, replayed_rows
from torchnewton.curvature.factor import LayerRows, WeightedRows
from torchnewton.curvature.jacobian import Jacobian
from torchnewton.curvature.layer_jacobian import LayerJacobian
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import NotPerSampleError, Tape
from torchnewton.vectors import Vector, inner_products, is_distributed


class GaussNewton(LinearOperator):
    """G = JᵀBJ, J = ∂z/∂θ and B = ∂²f/∂z² at the outputs z where the loss f = ℓ(z) was split.

    Without `jacobian` the products are made by kept double backward, or, where so many are expected that it pays, by
    explicit layer factors; `path` says which.

    Of a nonlinear function f of torch's losses ℓ (the root of an mse_loss, a focal loss of cross entropies) B takes
    Σ (∂f/∂ℓ) ∂²ℓ/∂z², which is positive semidefinite where f increases with ℓ. With the outputs marked by `tn.outputs`
    it is the whole ∂²f/∂z².

    Parameters that are DTensors have products alone.

    Shapes: P×P with P parameters; `G @ v` takes and gives a vector like the parameters.
    Cost: a product 4/3 of a gradient by the count of matrix products, 2/3 with layer factors; nothing for B.
    Errors: `RecordError` when the loss has no split.
    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.

    >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    >>> tape = record(lambda: torch.nn.functional.mse_loss(x @ theta, torch.zeros(2).double()), [theta])
    >>> GaussNewton(tape).to_dense()  # xᵀx, since the mean over two squares has the second derivative 1
    tensor([[2., 1.],
            [1., 1.]], dtype=torch.float64)
    """

    def __init__(self, tape: Tape, jacobian: Jacobian | None = None) -> None:
        convex = all(bool((piece.weight >= 0).all()) for piece in tape.pieces)
        super().__init__(tape.params, tape.params, is_symmetric=True, is_positive_semidefinite=convex)
        self.tape = tape
        self.jacobian = Jacobian(tape) if jacobian is None else jacobian
        self._is_local = not any(is_distributed(p) for p in tape.params)
        self._chooses = jacobian is None and self._is_local

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """J'(B(Jv))."""
        return self.jacobian.adjoint(self.curved(self.jacobian.apply(v)))

    def quadratic_form(
        self, directions: Sequence[Sequence[Tensor]], gram: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """(JD)ᵀB(JD): half a product each."""
        moved = [self.jacobian.apply(d) for d in directions]
        return inner_products(moved, [self.curved(u) for u in moved]), len(moved) / 2

    def curved(self, u: Sequence[Tensor]) -> Vector:
        """Bu."""
        terms = enumerate(self.tape.terms)
        return [y for number, term in terms for y in term.hessian_product(self.tape.of_term(u, number))]

    @cached_property
    def _explicit(self) -> LayerJacobian | None:
        """The explicit layers, where they may be used."""
        if isinstance(self.jacobian, LayerJacobian):
            return self.jacobian
        return LayerJacobian(self.tape) if self._chooses else None

    @cached_property
    def _factors(self) -> LayerRows | None:
        """R = B^½J by layer factors; None where B has no root by sample."""
        if self._explicit is None or not self.is_positive_semidefinite:
            return None
        try:
            return LayerRows(self._explicit)
        except NotPerSampleError:
            return None

    def costs(self, num_products: int = 1) -> Costs:
        """See `torchnewton.curvature.cost_model`."""
        return gauss_newton_costs(self.tape, self._explicit, num_products)

    def expect(self, num_products: int) -> None:
        """Take layer factors if they pay for that many products."""
        explicit = self._explicit if self._chooses and self.jacobian is not self._explicit else None
        if explicit is not None and self.costs(num_products).setup > 0:
            self.jacobian = explicit

    @property
    def gradients_per_product(self) -> float:
        """Those of the Jacobian."""
        return self.jacobian.gradients_per_product

    @property
    def path(self) -> str:
        """How products are made."""
        return self.jacobian.path

    @cached_property
    def _rows(self) -> WeightedRows | None:
        """R with G = RᵀR, by layer factors or else by a replay of the closure with parameters per sample."""
        if not (self._is_local and self.is_positive_semidefinite):
            return None
        if self._factors is not None and self._factors.factors.is_complete:
            return self._factors
        try:
            return replayed_rows(self.tape)
        except NotPerSampleError:
            return None

    @cached_property
    def _dense(self) -> Tensor:
        if not self._is_local:
            raise ValueError(
                "GaussNewton: parameters that are DTensors have products alone: solve by CG, MINRES or BiCGSTAB in the "
                "place of a factorization."
            )
        if self._rows is None:
            return dense_from_rows(self.tape, self.jacobian)
        return self._rows.normal_equations(None, torch.float64)[0]

    def _exact_diagonal(self) -> Vector | None:
        """From the rows by sample: exact for the price of a few products where there are few outputs a sample."""
        return None if self._rows is None else self._rows.diagonal()

    def factored(self) -> tuple[WeightedRows, float] | None:
        """R = B^½J, r rows for each sample, r the rank of its B; None without per-sample rows, and for DTensors."""
        return None if self._rows is None else (self._rows, 0.0)

    def to_dense(self) -> Tensor:
        """The matrix in float64, from the rows of J, never by P products; it is kept.

        Where the closure treats samples independently, the rows come from layer factors, or from a replay with copies
        of the parameters for every sample: one backward pass for each of the M numbers a sample has in the outputs.
        Otherwise every row of J takes its own backward pass. Memory: R (at most N·M·P numbers) and the matrix.
        """
        return self._dense

    def can_factor(self) -> bool:
        """Whether there are rows by sample."""
        return self._rows is not None
