"""The weighted mean of operators over many closures or batches, one graph at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.costs import Costs
from torchnewton.curvature.gauss_newton import GaussNewton
from torchnewton.curvature.hessian import Hessian
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import Closure, RecordError, Tape, record
from torchnewton.record.replay import RandomState, kept_gradients, same_random_numbers
from torchnewton.vectors import Vector

Curvature = Callable[[Tape], LinearOperator]
Weights = Sequence[float] | Callable[[Any], float]


class Average(LinearOperator):
    """A = Σᵢ wᵢAᵢ / Σᵢ wᵢ over closures or the batches of a loader, at the parameters' present values.

        A = tn.Average([closure_1, closure_2], params)                       # equal weights
        A = tn.Average(loader, params, lambda batch: F.mse_loss(model(batch[0]), batch[1]))

    `loss_of_batch` makes closures of batches. Then the weights are the numbers of samples, the length of the first
    tensor of each batch, so that means over batches, the last one short, add up to the mean over the data; for other
    ones give `weights`: a list of numbers, or a function of a batch (of a closure, without `loss_of_batch`).
    `curvature` makes Aᵢ from a tape. `A.loss` and `A.gradient` are averages with the same weights.

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
        batches: Iterable[Any],
        params: Sequence[Tensor],
        loss_of_batch: Callable[[Any], Tensor] | None = None,
        *,
        curvature: Curvature = GaussNewton,
        weights: Weights | None = None,
    ) -> None:
        self.params = list(params)
        if not self.params:
            raise ValueError("Average: params is empty; give the parameters to differentiate with respect to.")
        if iter(batches) is batches:
            raise ValueError("Average: batches is an iterator, which ends after one pass; give a list or a loader.")
        self._batches = batches
        self._loss_of_batch = loss_of_batch
        self._curvature = curvature
        self._weights = weights if weights is None or callable(weights) else list(weights)
        self._devices = [p.device for p in self.params]
        start = RandomState(self._devices)
        self._random_state: RandomState | None = None
        self.gradient = vectors.zeros_like(self.params)
        self._costs = Costs(dense=0.0)
        self._symmetric = self._positive_semidefinite = True
        self.total_weight, self.loss = self._pass(self._first_visit)
        self.gradient = vectors.scale(self.gradient, 1 / self.total_weight)
        self._random_state = None if start.is_current() else start
        super().__init__(
            self.params,
            self.params,
            is_symmetric=self._symmetric,
            is_positive_semidefinite=self._positive_semidefinite,
        )

    def _first_visit(self, tape: Tape, A: LinearOperator, weight: float) -> None:
        if [x.shape for x in A.domain] != [x.shape for x in A.codomain]:
            raise ValueError(
                f"Average: curvature made an operator of shape {A.shape}; it must be square, like GaussNewton."
            )
        vectors.add_(self.gradient, tape.gradient, weight)
        self._costs = self._costs + A.costs(1)
        self._symmetric &= A.is_symmetric
        self._positive_semidefinite &= A.is_positive_semidefinite

    def _weighted_closures(self) -> Iterator[tuple[Closure, float]]:
        given = iter(self._weights) if isinstance(self._weights, list) else None
        for batch in self._batches:
            if self._loss_of_batch is None and not callable(batch):
                raise ValueError(
                    f"Average: batches holds a {type(batch).__name__}, which is no closure; say by loss_of_batch what "
                    "its loss is."
                )
            if given is not None:
                weight = next(given, None)
            elif callable(self._weights):
                weight = self._weights(batch)
            else:
                weight = 1 if self._loss_of_batch is None else _num_samples(batch)
            if weight is None or not 0 <= weight < math.inf:
                raise ValueError(f"Average: weights={self._weights} must give a number of at least 0 to each batch.")
            yield batch if self._loss_of_batch is None else partial(self._loss_of_batch, batch), float(weight)
        if given is not None and next(given, None) is not None:
            raise ValueError(f"Average: weights={self._weights} has more entries than there are batches.")

    def _pass(self, visit: Callable[[Tape, LinearOperator, float], None]) -> tuple[float, Tensor]:
        """Record every closure and show it to `visit`; gives the sum of the weights and the mean loss."""
        total, loss = 0.0, torch.zeros((), dtype=self.params[0].dtype, device=self.params[0].device)
        with same_random_numbers(self._random_state, self._devices), kept_gradients(self.params):
            for closure, weight in self._weighted_closures():
                total += weight
                loss = loss + weight * self._visit(closure, weight, visit)
        if not total > 0:
            raise ValueError("Average: there is no batch with a weight above 0.")
        return total, loss / total

    def _visit(self, closure: Closure, weight: float, visit: Callable[[Tape, LinearOperator, float], None]) -> Tensor:
        """One closure; its graph is dropped on return."""
        tape = record(closure, self.params, create_graph=self._curvature is not Hessian)  # which keeps its own
        try:
            with same_random_numbers(RandomState(self._devices), self._devices):
                visit(tape, self._curvature(tape), weight)
            return tape.loss
        finally:
            tape.buffers.restore()

    def _again(self, visit: Callable[[Tape, LinearOperator, float], None]) -> None:
        """A pass that must be a repetition of the first."""
        _, loss = self._pass(visit)
        now, first = float(loss), float(self.loss)
        tolerance = torch.finfo(loss.dtype).eps ** 0.5 * max(abs(first), 1e-8)
        if math.isfinite(first) and not abs(now - first) <= tolerance:
            raise RecordError(
                f"the average loss was {first:.8g} and is {now:.8g} now: build the Average anew after the parameters "
                "have moved, and let random numbers come from torch's global generator."
            )

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """One product with each Aᵢ."""
        return self.apply_each([list(v)])[0]

    def apply_each(self, vs: Sequence[Vector]) -> list[Vector]:
        """As many products with each Aᵢ as there are vectors."""
        totals = [vectors.zeros_like(self.params) for _ in vs]

        def visit(tape: Tape, A: LinearOperator, weight: float) -> None:
            for total, v in zip(totals, vs, strict=True):
                vectors.add_(total, A.apply(v), weight / self.total_weight)

        if vs:
            self._again(visit)
        return totals

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """One product with each Aᵢᵀ."""
        total = vectors.zeros_like(self.params)
        self._again(lambda tape, A, weight: vectors.add_(total, A.adjoint(u), weight / self.total_weight))
        return total

    def to_dense(self) -> Tensor:
        """The mean of the matrices, in one pass."""
        found: list[Tensor] = []

        def visit(tape: Tape, A: LinearOperator, weight: float) -> None:
            part = A.to_dense() * (weight / self.total_weight)
            found[:] = [found[0] + part] if found else [part]

        self._again(visit)
        return found[0]

    def _exact_diagonal(self) -> Vector | None:
        total: Vector | None = vectors.zeros_like(self.params)

        def visit(tape: Tape, A: LinearOperator, weight: float) -> None:
            nonlocal total
            part = A._exact_diagonal() if total is not None else None
            total = None if total is None or part is None else vectors.add(total, part, weight / self.total_weight)

        self._again(visit)
        return total

    def costs(self, num_products: int = 1) -> Costs:
        """Those of all closures, which a product or a matrix records once more at about the cost of a product."""
        once = self._costs
        return Costs(product=2 * once.product + once.setup, dense=once.dense + once.product)


def _num_samples(batch: Any) -> int:
    """The length of the first tensor of a batch."""
    first = next(_tensors(batch), None)
    if first is None or first.dim() == 0:
        raise ValueError(
            f"Average: a batch ({type(batch).__name__}) has no tensor that tells its number of samples; give "
            "weights=lambda batch: number of samples."
        )
    return len(first)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)
