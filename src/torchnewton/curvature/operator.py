"""Linear operators on vectors: what a solver multiplies with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.costs import Costs
from torchnewton.vectors import Vector


class LinearOperator(ABC):
    """A linear map from vectors like `domain` to vectors like `codomain`.

    `A @ v` takes a list of tensors and gives one, or takes one flat tensor and gives one. `A + damping` adds λI,
    `A + B` and `2.0 * A` are operators again.
    """

    def __init__(
        self,
        domain: Sequence[Tensor],
        codomain: Sequence[Tensor],
        *,
        is_symmetric: bool = False,
        is_positive_semidefinite: bool = False,
        parts: Sequence[LinearOperator] = (),
    ) -> None:
        self.domain = list(domain)
        self.codomain = list(codomain)
        self.is_symmetric = is_symmetric
        self.is_positive_semidefinite = is_positive_semidefinite
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return vectors.num_entries(self.codomain), vectors.num_entries(self.domain)

    def costs(self) -> Costs:
        """What a product, the dense matrix and a factor cost; by default the matrix is stored."""
        if self.parts:
            return sum((part.costs() for part in self.parts[1:]), self.parts[0].costs())
        rows, columns = self.shape
        return Costs(product=2.0 * rows * columns, dense=2.0 * rows * columns**2)

    def can_form_dense(self) -> bool:
        """Whether matrix and factor are to be had at that cost; the work to find out is kept."""
        return all(part.can_form_dense() for part in self.parts)

    def factored(self) -> tuple[Tensor, float] | None:
        """(R, σ) with A = RᵀR + σI, R in float64; None where there is no such factor."""
        return None

    @abstractmethod
    def apply(self, v: Sequence[Tensor]) -> Vector:
        """The product with a list of tensors."""

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Sequence[Tensor]) -> Vector: ...
    def __matmul__(self, v: Tensor | Sequence[Tensor]) -> Tensor | Vector:
        """A @ v."""
        if not isinstance(v, Tensor):
            self._check([tuple(x.shape) for x in v])
            return self.apply(v)
        if v.shape != (self.shape[1],):
            raise ValueError(f"A @ v: v has shape {tuple(v.shape)}, A takes ({self.shape[1]},) or a list of tensors.")
        return vectors.flatten(self.apply(vectors.unflatten(v, self.domain)))

    def _check(self, shapes: list[tuple[int, ...]]) -> None:
        expected = [tuple(x.shape) for x in self.domain]
        if shapes != expected:
            raise ValueError(f"A @ v: v has the shapes {shapes}, A takes {expected}.")

    def to_dense(self) -> Tensor:
        """The matrix, one product a column."""
        columns = torch.eye(self.shape[1], dtype=self.domain[0].dtype, device=self.domain[0].device)
        return torch.stack([self @ column for column in columns], dim=1)

    def __add__(self, other: LinearOperator | float) -> LinearOperator:
        """A + B, or A + λI."""
        return Sum(self, other) if isinstance(other, LinearOperator) else Shifted(self, float(other))

    def __mul__(self, factor: float) -> LinearOperator:
        """αA."""
        return Scaled(self, float(factor))

    __rmul__ = __mul__


class Shifted(LinearOperator):
    """A + λI."""

    def __init__(self, base: LinearOperator, shift: float) -> None:
        super().__init__(
            base.domain,
            base.codomain,
            is_symmetric=base.is_symmetric,
            is_positive_semidefinite=base.is_positive_semidefinite and shift >= 0,
            parts=[base],
        )
        self.base = base
        self.shift = shift

    def factored(self) -> tuple[Tensor, float] | None:
        """That of A, shifted."""
        found = self.base.factored()
        return None if found is None else (found[0], found[1] + self.shift)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return vectors.add(self.base.apply(v), v, self.shift)

    def to_dense(self) -> Tensor:
        """The matrix; costs what that of A costs."""
        dense = self.base.to_dense().clone()
        dense.diagonal().add_(self.shift)
        return dense


class Scaled(LinearOperator):
    """αA."""

    def __init__(self, base: LinearOperator, factor: float) -> None:
        super().__init__(
            base.domain,
            base.codomain,
            is_symmetric=base.is_symmetric,
            is_positive_semidefinite=base.is_positive_semidefinite and factor >= 0,
            parts=[base],
        )
        self.base = base
        self.factor = factor

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return vectors.scale(self.base.apply(v), self.factor)

    def to_dense(self) -> Tensor:
        """The matrix; costs what that of A costs."""
        return self.base.to_dense() * self.factor


class Sum(LinearOperator):
    """A + B."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        if first.shape != second.shape:
            raise ValueError(f"A + B: the shapes {first.shape} and {second.shape} differ.")
        super().__init__(
            first.domain,
            first.codomain,
            is_symmetric=first.is_symmetric and second.is_symmetric,
            is_positive_semidefinite=first.is_positive_semidefinite and second.is_positive_semidefinite,
            parts=[first, second],
        )
        self.first = first
        self.second = second

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return vectors.add(self.first.apply(v), self.second.apply(v))

    def to_dense(self) -> Tensor:
        """The matrix; costs what those of A and B cost."""
        return self.first.to_dense() + self.second.to_dense()


class Diagonal(LinearOperator):
    """A diagonal matrix, given by its diagonal as a vector."""

    def __init__(self, entries: Sequence[Tensor]) -> None:
        positive = all(bool((d >= 0).all()) for d in entries)
        super().__init__(entries, entries, is_symmetric=True, is_positive_semidefinite=positive)
        self.entries = list(entries)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return [d * x for d, x in zip(self.entries, v, strict=True)]

    def costs(self) -> Costs:
        """One operation an entry."""
        return Costs(product=float(self.shape[0]), dense=float(self.shape[0]))

    def to_dense(self) -> Tensor:
        """The matrix."""
        return torch.diag(vectors.flatten(self.entries))
