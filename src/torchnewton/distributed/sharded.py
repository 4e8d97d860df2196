"""The objective of several processes whose parameters are in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import Estimate, LinearOperator
from torchnewton.distributed.data_parallel import DataParallel, Share
from torchnewton.distributed.layout import Layout
from torchnewton.distributed.processes import Table
from torchnewton.distributed.reduced import Reduced
from torchnewton.distributed.shard import present
from torchnewton.record import StreamedTape, Tape, moved
from torchnewton.solvers import Operator
from torchnewton.vectors import Vector


class ShardedShare(Share):
    """One rank's samples, and its parts of all vectors; inner products are sums over the ranks, the same on each."""

    def __init__(self, parallel: DataParallel, table: Table) -> None:
        super().__init__(parallel, table)
        whole = present()
        assert whole is not None  # `record_share` asks
        self.whole = whole

    def gradient(self, tape: Tape | StreamedTape) -> Vector:
        """This rank's part of ∇f; the whole one is given back."""
        found = self.reduced(tape.gradient)
        if isinstance(tape, Tape):
            tape.forget_gradient()
        return found

    def reduced(self, v: Vector) -> Vector:
        """This rank's part of Σ wᵣvᵣ."""
        return self.whole.layout.summed(list(v), self.weight)

    def operator(self, A: LinearOperator) -> LinearOperator:
        """Σ wᵣAᵣ on parts of vectors."""
        return ShardedReduced(A, self.whole.layout, self.weight, self.fraction)

    def preconditioner(self, M: Operator | None) -> Operator | None:
        """M, which knows whole layers, on parts of vectors."""
        known = M is None or not isinstance(M, LinearOperator) or any(map(vectors.is_distributed, M.domain))
        return M if known else OnParts(M, self.whole.layout)  # type: ignore[arg-type]

    @contextmanager
    def moved(self, params: Sequence[Tensor], direction: Sequence[Tensor], length: float) -> Iterator[None]:
        """The whole parameters there, too."""
        try:
            with moved(params, direction, length):
                self.whole.renew()
                yield
        finally:
            self.whole.renew()

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Inner products are sums over the ranks already."""
        yield

    def check_same(self, params: Sequence[Tensor]) -> None:
        """Every entry has one owner."""

    def of_first(self, v: Vector) -> Vector:
        """v: every rank has the parts that count."""
        return v


class OnParts(LinearOperator):
    """A symmetric operator that every rank has, on vectors of which it has a part: they are made whole and cut."""

    def __init__(self, base: LinearOperator, layout: Layout) -> None:
        super().__init__(
            layout.params,
            layout.params,
            is_symmetric=base.is_symmetric,
            is_positive_semidefinite=base.is_positive_semidefinite,
        )
        self.base, self.layout = base, layout

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return self.layout.cut(self.base.apply(self.layout.gathered(v)))


class ShardedReduced(Reduced):
    """A = Σ wᵣAᵣ on vectors of which every rank has a part; Aᵣ works on whole ones.

    Cost: that of Aᵣ; for a product P numbers are received and P sent. Memory: the whole vector and its product, for a
    while.
    """

    def __init__(self, local: LinearOperator, layout: Layout, weight: float, fraction: float) -> None:
        super().__init__(local, layout.processes, weight, fraction)
        self.layout = layout
        self.domain = self.codomain = layout.params

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return self.layout.summed(self.local.apply(self.layout.gathered(v)), self.weight)

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """Σ wᵣAᵣᵀu."""
        return self.layout.summed(self.local.adjoint(self.layout.gathered(u)), self.weight)

    def apply_each(self, vs: Sequence[Vector]) -> list[Vector]:
        """One after the other, which takes the memory of one."""
        return [self.apply(v) for v in vs]

    def quadratic_form(
        self, directions: Sequence[Sequence[Tensor]], gram: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Σ wᵣDᵀAᵣD: k vectors made whole, k² numbers summed."""
        return super().quadratic_form([self.layout.gathered(d) for d in directions])

    def diagonal(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[Vector]:
        """The sum of those of the ranks, each with its own samples."""
        found = super().diagonal(num_samples, generator)
        return Estimate(self.layout.cut(found.value), self.layout.cut(found.standard_error))
