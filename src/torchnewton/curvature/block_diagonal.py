"""The diagonal blocks of an operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.costs import Costs
from torchnewton.curvature.estimate import Estimate
from torchnewton.curvature.operator import LinearOperator
from torchnewton.vectors import Vector


class Blocks(LinearOperator):
    """diag(A₁₁, …, Aₖₖ): A without the blocks that couple two groups of parameters; made by `A.blocks(groups)`.

    Shapes: as A. `groups` is a list of lists of the tensors of `A.domain`, each in one list; by default every
    parameter is a block of its own.
    Cost: a product takes k products with A, one for each group; `to_dense`, `diagonal` and `trace` are those of A.
    Memory: two vectors like the parameters.
    Errors: `ValueError` when the groups are no partition of the parameters, or A is not square.

    >>> theta, phi = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    >>> tape = record(lambda: (theta**2 * phi).sum(), [theta, phi])
    >>> Hessian(tape).to_dense()
    tensor([[2., 2.],
            [2., 0.]])
    >>> Hessian(tape).blocks().to_dense()
    tensor([[2., 0.],
            [0., 0.]])
    """

    def __init__(self, base: LinearOperator, groups: Sequence[Sequence[Tensor]] | None = None) -> None:
        base.require_square("A.blocks()")
        super().__init__(
            base.domain,
            base.codomain,
            is_symmetric=base.is_symmetric,
            is_positive_semidefinite=base.is_positive_semidefinite,
            parts=[base],
        )
        self.base = base
        self.positions = _positions(base.domain, [[x] for x in base.domain] if groups is None else groups)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """One product with A for each block, of v with zeros outside of the block."""
        result = vectors.zeros_like(self.domain)
        for block in self.positions:
            inside = set(block)
            y = self.base.apply([x if i in inside else torch.zeros_like(x) for i, x in enumerate(v)])
            for i in block:
                result[i] = y[i]
        return result

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """The blocks of Aᵀ."""
        return self.apply(u) if self.is_symmetric else Blocks(_Adjoint(self.base), self._groups()).apply(u)

    def _groups(self) -> list[list[Tensor]]:
        return [[self.domain[i] for i in block] for block in self.positions]

    def to_dense(self) -> Tensor:
        """The matrix; costs what that of A costs."""
        number = {i: b for b, block in enumerate(self.positions) for i in block}
        owner = torch.cat([torch.full((x.numel(),), number[i]) for i, x in enumerate(self.domain)])
        dense = self.base.to_dense()
        owner = owner.to(dense.device)
        return dense * (owner[:, None] == owner)

    def costs(self, num_products: int = 1) -> Costs:
        """k products with A; the matrix as for A."""
        costs = self.base.costs(len(self.positions) * num_products)
        return Costs(len(self.positions) * costs.product, costs.setup, costs.dense, dense_overhead=costs.dense_overhead)

    def expect(self, num_products: int) -> None:
        """Expect k times as many products with A."""
        self.base.expect(len(self.positions) * num_products)

    @property
    def gradients_per_product(self) -> float:
        """Those of k products with A."""
        return len(self.positions) * self.base.gradients_per_product

    def diagonal(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[Vector]:
        """That of A."""
        return self.base.diagonal(num_samples, generator)

    def trace(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[float]:
        """That of A."""
        return self.base.trace(num_samples, generator)


class _Adjoint(LinearOperator):
    """Aᵀ."""

    def __init__(self, base: LinearOperator) -> None:
        super().__init__(base.codomain, base.domain)
        self.base = base

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return self.base.adjoint(v)


def _positions(domain: Sequence[Tensor], groups: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """The groups by the positions of their tensors."""
    position = {id(x): i for i, x in enumerate(domain)}
    unknown = [tuple(x.shape) for group in groups for x in group if id(x) not in position]
    if unknown:
        raise ValueError(f"A.blocks(groups): tensors of shapes {unknown} are none of A's parameters.")
    found = [[position[id(x)] for x in group] for group in groups if len(group)]
    used = sorted(i for block in found for i in block)
    if used != list(range(len(domain))):
        raise ValueError(
            f"A.blocks(groups): the groups hold {len(used)} tensors, of which {len(set(used))} differ; put each of the "
            f"{len(domain)} parameters of A into one group."
        )
    return found
