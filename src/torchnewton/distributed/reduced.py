"""The curvature of a loss that is spread over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.costs import Costs
from torchnewton.curvature import Estimate, LinearOperator
from torchnewton.distributed.processes import Processes
from torchnewton.vectors import Vector

EXCHANGE = 300.0  # operations of a matrix product that take as long as one number in an exchange
LATENCY = 2e6  # and as the start of one


def weighted(x: Sequence[Tensor], weight: float) -> Vector:
    """weight · x; 0 for the weight 0, whatever x holds."""
    return vectors.scale(x, weight) if weight else vectors.zeros_like(x)


class Reduced(LinearOperator):
    """A = Σ wᵣAᵣ over the ranks r of a group, Aᵣ the operator of rank r with its own samples.

    Whatever is linear in A is the sum of what the ranks find: products, DᵀAD of a few directions, the dense matrix,
    diagonal and trace. Rows by sample stay where they are, so there is no Gram matrix and no `Dual`.

    `own` is what the samples of this rank tell of A: wᵣAᵣ over `fraction`, the share of the samples that are here.

    Shapes: as Aᵣ, the same on all ranks. Every method that multiplies is called by all ranks in the same order. An
    exception on one rank, as of a product that runs the closure, is one on all: see `Processes.agree`.
    Cost: that of Aᵣ, and one message of P numbers for a product, k² for DᵀAD, P² for the matrix. Memory: one vector.
    """

    def __init__(self, local: LinearOperator, processes: Processes, weight: float, fraction: float = 1.0) -> None:
        super().__init__(
            local.domain,
            local.codomain,
            is_symmetric=local.is_symmetric,
            is_positive_semidefinite=local.is_positive_semidefinite,
        )
        self.local = local
        self.processes = processes
        self.weight = weight
        self.fraction = fraction
        self._costs: dict[int, Costs] = {}

    def own(self) -> LinearOperator:
        """Aᵣ, in the scale of A."""
        scale = self.weight / self.fraction if self.fraction else 0.0
        return self.local if scale == 1 else self.local * scale

    def _sum(self, run: Callable[[], Sequence[Tensor]], like: Sequence[Tensor]) -> Vector:
        """Σ wᵣ · what `run` finds; a rank that fails sends NaN, so that all ask who has failed, at no other cost."""
        failure = None
        try:
            found = weighted(run(), self.weight)
        except Exception as error:
            failure, found = error, [torch.full_like(x, math.nan) for x in like]
        total = self.processes.sum(found)
        if not all(bool(x.isfinite().all()) for x in total):
            self.processes.agree(failure)
        return total

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return self._sum(lambda: self.local.apply(v), self.codomain)

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """Σ wᵣAᵣᵀu."""
        return self._sum(lambda: self.local.adjoint(u), self.domain)

    def apply_each(self, vs: Sequence[Vector]) -> list[Vector]:
        """Several products in one message."""
        width = len(self.codomain)
        if not vs:
            return []
        like = [y for _ in vs for y in self.codomain]
        found = self._sum(lambda: [y for product in self.local.apply_each(vs) for y in product], like)
        return [found[i : i + width] for i in range(0, len(found), width)]

    def quadratic_form(
        self, directions: Sequence[Sequence[Tensor]], gram: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Σ wᵣDᵀAᵣD: k² numbers."""
        products = [0.0]

        def run() -> Vector:
            with vectors.agreeing(None):
                form, products[0] = self.local.quadratic_form(directions)
            return [form.to(self.domain[0].device)]

        size = len(directions)
        (total,) = self._sum(run, [self.domain[0].new_empty(size, size, dtype=torch.float64)])
        return total.cpu(), products[0]

    def to_dense(self) -> Tensor:
        """The matrix in float64; P² numbers."""
        like = self.domain[0].new_empty((), dtype=torch.float64).expand(self.shape)
        (dense,) = self._sum(lambda: [self.local.to_dense().double()], [like])
        return dense

    def diagonal(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[Vector]:
        """The sum of those of the ranks, each with its own samples."""

        def run() -> Vector:
            with vectors.agreeing(None):
                found = self.local.diagonal(num_samples, generator)
            return [*found.value, *(e.square() * self.weight for e in found.standard_error)]

        total, width = self._sum(run, [*self.domain, *self.domain]), len(self.domain)
        return Estimate(total[:width], [v.sqrt() for v in total[width:]])

    def trace(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[float]:
        """The sum of those of the ranks, each with its own samples."""
        w = self.weight

        def run() -> Estimate[float]:
            with vectors.agreeing(None):
                return self.local.trace(num_samples, generator)

        def numbers(found: Estimate[float]) -> list[float]:
            return [w * found.value, (w * found.standard_error) ** 2] if w else [0.0, 0.0]

        _, rows = self.processes.together(run, numbers, width=2)
        return Estimate(math.fsum(row[0] for row in rows), math.sqrt(math.fsum(row[1] for row in rows)))

    def costs(self, num_products: int = 1) -> Costs:
        """Those of the slowest rank, and the exchanges."""
        if num_products not in self._costs:
            found = self.local.costs(num_products)
            rows = self.processes.table([found.product, found.setup, found.dense, found.dense_overhead])
            product, setup, dense, overhead = (max(column) for column in zip(*rows, strict=True))
            size = self.shape[1]
            exchange = LATENCY + EXCHANGE * float(size) ** 2
            self._costs[num_products] = Costs(
                product + LATENCY + EXCHANGE * size, setup, dense + exchange, dense_overhead=overhead + exchange
            )
        return self._costs[num_products]

    def expect(self, num_products: int) -> None:
        """Expect as many products with Aᵣ."""
        self.local.expect(num_products)

    def can_factor(self) -> bool:
        """Whether every rank can."""
        return all(row[0] for row in self.processes.table([self.local.can_factor()]))

    @property
    def gradients_per_product(self) -> float:
        """As Aᵣ."""
        return self.local.gradients_per_product

    @property
    def covers_whole_loss(self) -> bool:
        """As Aᵣ."""
        return self.local.covers_whole_loss

    @property
    def path(self) -> str:
        """As Aᵣ."""
        return self.local.path
