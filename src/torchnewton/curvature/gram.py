"""The Gram matrix of the weighted Jacobian: the Gauss-Newton matrix seen from the samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from torchnewton.curvature.dense import replayed_rows
from torchnewton.curvature.factor import LayerRows, WeightedRows
from torchnewton.curvature.layer_jacobian import LayerJacobian
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import NotPerSampleError, Tape
from torchnewton.vectors import Vector


def weighted_rows(tape: Tape, jacobian: LayerJacobian | None = None) -> WeightedRows:
    """R = B^½J by layer factors where these make up all parameters, else by a replay of the closure.

    Raises `NotPerSampleError` where the closure mixes samples.
    """
    jacobian = LayerJacobian(tape) if jacobian is None else jacobian
    if jacobian.expected_coverage == 1:
        try:
            rows = LayerRows(jacobian)
            if rows.factors.is_complete:
                return rows
        except NotPerSampleError:
            pass
    return replayed_rows(tape)


class Gram(LinearOperator):
    """K = RRᵀ with R = B^½J: n×n, its eigenvalues beside zeros those of the Gauss-Newton matrix G = RᵀR.

    n = N·r with N samples and r the rank of a sample's B (C − 1 for cross entropy with C classes); `K @ w` takes one
    vector of n numbers, in a list or alone. R is made by the layer factors of `jacobian`, by default new ones.

    Cost: a product one of G; `to_dense` the Gram matrices of the layers, (AAᵀ) ∘ (DDᵀ) for linear ones: n²·ΣO
    operations with O outputs of a layer, never n·P numbers for them.
    Errors: `NotPerSampleError` (a `RuntimeError`) where the closure mixes samples or B is not positive
    semidefinite.

    >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    >>> tape = record(lambda: torch.nn.functional.mse_loss(x @ theta, torch.zeros(2).double()), [theta])
    >>> Gram(tape).to_dense()  # xxᵀ, since the mean over two squares has the second derivative 1
    tensor([[1., 1.],
            [1., 2.]], dtype=torch.float64)
    """

    def __init__(self, tape: Tape, jacobian: LayerJacobian | None = None) -> None:
        tape.require_split()
        self._rows = weighted_rows(tape, jacobian)
        like = tape.params[0].new_empty(self._rows.num_rows)
        super().__init__([like], [like], is_symmetric=True, is_positive_semidefinite=True)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """R(Rᵀw)."""
        return [self._rows.product(self._rows.adjoint(v[0])).to(v[0].dtype)]

    @cached_property
    def _dense(self) -> Tensor:
        return self._rows.gram(self.domain[0].dtype)

    def to_dense(self) -> Tensor:
        """The matrix; it is kept."""
        return self._dense

    def product(self, v: Sequence[Tensor]) -> Tensor:
        """Rv."""
        return self._rows.product(v)

    def pull_back(self, w: Tensor) -> Vector:
        """Rᵀw."""
        return self._rows.adjoint(w)
