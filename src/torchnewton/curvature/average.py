"""The weighted mean of operators over many closures or batches, one graph at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from torchnewton import vectors
from torchnewton.costs import Costs
from torchnewton.curvature.gauss_newton import GaussNewton
from torchnewton.curvature.halves import Halves
from torchnewton.curvature.hessian import Hessian
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import Objective, StreamedTape, Tape, Weights, over
from torchnewton.vectors import Vector

Curvature = Callable[[Tape], LinearOperator]


class Average(LinearOperator):
    """A = Σᵢ wᵢAᵢ / Σᵢ wᵢ over closures or the batches of a loader, at the parameters' present values.

        A = tn.Average([closure_1, closure_2], params)                       # equal weights
        A = tn.Average(loader, params, lambda batch: F.mse_loss(model(batch[0]), batch[1]))

    `batches`, `loss_of_batch` and `weights` are those of `over`; an objective that `over` has made takes the place of
    all three. `curvature` makes Aᵢ from a tape. `A.loss` and `A.gradient` are averages with the same weights.

    Every product records each closure again and drops its graph: random numbers are those of the first pass, which
    the constructor makes; buffers (BatchNorm) and `param.grad` are put back, so that A is one fixed matrix. A loader
    that shuffles is iterated again from the same state of torch's global generator.

    Shapes: P×P with P parameters.
    Cost: a product takes about a gradient and a product with Aᵢ for each closure; `A @ M`, `to_dense` and `diagonal`
    record each closure once for all columns. Memory: the graph of one closure and three vectors like the parameters.
    Errors: `ValueError` for arguments; `RecordError` when the loss is another one than in the first pass, because the
    parameters have moved or the closures draw from elsewhere.

    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> loss = lambda x: torch.nn.functional.mse_loss(x @ theta, torch.zeros(len(x)))
    >>> A = Average(rows.split(2), [theta], loss)  # a batch of two rows and one of one
    >>> A.to_dense()  # 2/3 Σ xₙxₙᵀ
    tensor([[0.6667, 0.0000],
            [0.0000, 1.3333]], dtype=torch.float64)
    >>> A.loss
    tensor(3.)
    """

    def __init__(
        self,
        batches: Iterable[Any] | Objective,
        params: Sequence[Tensor],
        loss_of_batch: Callable[[Any], Tensor] | None = None,
        *,
        curvature: Curvature = GaussNewton,
        weights: Weights | None = None,
    ) -> None:
        self.params = list(params)
        if not self.params:
            raise ValueError("Average: params is empty; give the parameters to differentiate with respect to.")
        self._curvature = curvature
        self._create_graph = curvature is not Hessian  # which keeps its own
        self._costs = Costs(dense=0.0)
        self._gradients_per_product = 0.0
        self._symmetric = self._positive_semidefinite = self._whole = True
        objective = batches if isinstance(batches, Objective) else over(batches, loss_of_batch, weights=weights)
        self.tape = StreamedTape(objective, self.params, self._first_visit)
        self.tape.buffers.restore()
        self.loss, self.gradient, self.total_weight = self.tape.loss, self.tape.gradient, self.tape.total_weight
        super().__init__(
            self.params,
            self.params,
            is_symmetric=self._symmetric,
            is_positive_semidefinite=self._positive_semidefinite,
        )

    def _first_visit(self, tape: Tape, weight: float) -> None:
        A = self._curvature(tape)
        if isinstance(A, Halves):
            raise ValueError(
                "the disagreement of halves is not known of a curvature that is streamed: leave it out "
                "(disagreement=None), or give a closure on one batch."
            )
        if [x.shape for x in A.domain] != [x.shape for x in A.codomain]:
            raise ValueError(
                f"Average: curvature made an operator of shape {A.shape}; it must be square, like GaussNewton."
            )
        self._costs = self._costs + A.costs(1)
        self._gradients_per_product = max(self._gradients_per_product, 1 + A.gradients_per_product)
        self._whole &= A.covers_whole_loss
        self._symmetric &= A.is_symmetric
        self._positive_semidefinite &= A.is_positive_semidefinite

    def _again(self, visit: Callable[[LinearOperator, float], None]) -> None:
        """Show the operator of every batch to `visit`, with its share of the weights."""

        def visit_tape(tape: Tape, weight: float) -> None:
            visit(self._curvature(tape), weight / self.total_weight)

        self.tape.again(visit_tape, create_graph=self._create_graph)

    @property
    def gradients_per_product(self) -> float:
        """A gradient for the recording, and those of Aᵢ."""
        return self._gradients_per_product

    @property
    def covers_whole_loss(self) -> bool:
        """Whether every Aᵢ does."""
        return self._whole

    @property
    def path(self) -> str:
        """How products are made."""
        return "streamed"

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """One product with each Aᵢ."""
        return self.apply_each([list(v)])[0]

    def apply_each(self, vs: Sequence[Vector]) -> list[Vector]:
        """As many products with each Aᵢ as there are vectors."""
        totals = [vectors.zeros_like(self.params) for _ in vs]

        def visit(A: LinearOperator, share: float) -> None:
            for total, y in zip(totals, A.apply_each(vs), strict=True):
                vectors.add_(total, y, share)

        if vs:
            self._again(visit)
        return totals

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """One product with each Aᵢᵀ."""
        total = vectors.zeros_like(self.params)
        self._again(lambda A, share: vectors.add_(total, A.adjoint(u), share))
        return total

    def to_dense(self) -> Tensor:
        """The mean of the matrices, in one pass."""
        found: list[Tensor] = []

        def visit(A: LinearOperator, share: float) -> None:
            part = A.to_dense() * share
            found[:] = [found[0] + part] if found else [part]

        self._again(visit)
        return found[0]

    def _exact_diagonal(self) -> Vector | None:
        total: Vector | None = vectors.zeros_like(self.params)

        def visit(A: LinearOperator, share: float) -> None:
            nonlocal total
            part = A._exact_diagonal() if total is not None else None
            total = None if total is None or part is None else vectors.add(total, part, share)

        self._again(visit)
        return total

    def costs(self, num_products: int = 1) -> Costs:
        """Those of all closures, which a product or a matrix records once more at about the cost of a product."""
        once = self._costs
        return Costs(
            product=2 * once.product + once.setup,
            dense=once.dense + once.product,
            dense_overhead=once.dense_overhead,
        )
