"""Linear operators on vectors: what a solver multiplies with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.costs import Costs
from torchnewton.curvature.estimate import Estimate, estimated_diagonal, estimated_trace
from torchnewton.curvature.scaled_rows import ScaledRows
from torchnewton.curvature.scipy_view import scipy_operator
from torchnewton.vectors import Vector

EXACT_SIZE = 1000  # up to so many parameters diagonal and trace come from the dense matrix
NUM_SAMPLES = 100  # products that an estimate takes unless it is told otherwise


class LinearOperator(ABC):
    """A linear map from vectors like `domain` to vectors like `codomain`.

    `A @ v` takes a list of tensors and gives one, or takes one flat tensor, or a matrix of such columns, and gives one.
    `A + damping` adds λI; `A + B`, `A - B`, `-A`, `2.0 * A` and `A / 2.0` are operators again.
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

    def costs(self, num_products: int = 1) -> Costs:
        """What products, the dense matrix and the Gram matrix cost; by default the matrix is stored."""
        if self.parts:
            return sum((part.costs(num_products) for part in self.parts[1:]), self.parts[0].costs(num_products))
        rows, columns = self.shape
        return Costs(product=2.0 * rows * columns, dense=2.0 * rows * columns**2)

    def expect(self, num_products: int) -> None:
        """Be told how many products will follow, so that work that pays only for many is done for many."""
        for part in self.parts:
            part.expect(num_products)

    def can_factor(self) -> bool:
        """Whether the dense matrix and the Gram matrix are to be had at that cost; the work to find out is kept."""
        return all(part.can_factor() for part in self.parts)

    def factored(self) -> tuple[Any, float] | None:
        """(R, σ) with A = RᵀR + σI; None where there is no such factor."""
        return None

    @property
    def gradients_per_product(self) -> float:
        """What a product costs in gradients of the same batch, by the count of matrix products a layer."""
        return max((part.gradients_per_product for part in self.parts), default=4 / 3)

    @property
    def covers_whole_loss(self) -> bool:
        """Whether also those parts of the loss count that reach the parameters beside the outputs."""
        return any(part.covers_whole_loss for part in self.parts)

    @property
    def path(self) -> str:
        """How products are made, where there is more than one way."""
        return ", ".join(part.path for part in self.parts if part.path)

    @abstractmethod
    def apply(self, v: Sequence[Tensor]) -> Vector:
        """The product with a list of tensors."""

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """Aᵀu."""
        if not self.is_symmetric:
            raise NotImplementedError(f"{type(self).__name__} is not symmetric and has no product with its transpose.")
        return self.apply(u)

    def quadratic_form(
        self, directions: Sequence[Sequence[Tensor]], gram: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """DᵀAD of k directions, k×k in float64 on the CPU, and the products it took, k unless there is another way.

        `gram` is DᵀD, where the caller knows it.
        """
        return vectors.inner_products(directions, self.apply_each([list(d) for d in directions])), len(directions)

    def apply_each(self, vs: Sequence[Vector]) -> list[Vector]:
        """The products with several lists of tensors."""
        return [self.apply(v) for v in vs]

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Sequence[Tensor]) -> Vector: ...
    def __matmul__(self, v: Tensor | Sequence[Tensor]) -> Tensor | Vector:
        """A @ v; for a matrix of k columns at the cost of k products."""
        if not isinstance(v, Tensor):
            self._check([tuple(x.shape) for x in v])
            return self.apply(v)
        size = self.shape[1]
        if v.dim() not in (1, 2) or v.shape[0] != size:
            raise ValueError(
                f"A @ v: v has shape {tuple(v.shape)}, A takes ({size},), ({size}, k) or a list of tensors."
            )
        if v.dim() == 1:
            return vectors.flatten(self.apply(vectors.unflatten(v, self.domain)))
        if v.shape[1] == 0:
            return v.new_zeros(self.shape[0], 0)
        products = self.apply_each([vectors.unflatten(column, self.domain) for column in v.T.contiguous()])
        return torch.stack([vectors.flatten(y) for y in products], dim=1)

    def _check(self, shapes: list[tuple[int, ...]]) -> None:
        expected = [tuple(x.shape) for x in self.domain]
        if shapes != expected:
            raise ValueError(f"A @ v: v has the shapes {shapes}, A takes {expected}.")

    def require_square(self, what: str) -> None:
        """Raise `ValueError` unless A has as many rows as columns."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"{what} needs a square operator; {type(self).__name__} has the shape {self.shape}.")

    def to_dense(self) -> Tensor:
        """The matrix, one product a column."""
        return self @ torch.eye(self.shape[1], dtype=self.domain[0].dtype, device=self.domain[0].device)

    def diagonal(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[Vector]:
        """The diagonal, a vector like the parameters, with its standard error.

        Exact, with error 0, where A has a closed form or at most `EXACT_SIZE` parameters (then it costs `to_dense`),
        otherwise the mean over `NUM_SAMPLES` random vectors. With `num_samples` it is always the mean over so many:
        see `estimated_diagonal`.
        """
        self.require_square("A.diagonal()")
        if num_samples is not None:
            return estimated_diagonal(self, _at_least_two(num_samples, "diagonal"), generator)
        exact = self._exact_diagonal()
        if exact is None and self.shape[0] <= EXACT_SIZE:
            parts = vectors.unflatten(self.to_dense().diagonal().contiguous(), self.domain)
            exact = [part.to(x.dtype) for part, x in zip(parts, self.domain, strict=True)]
        if exact is None:
            return estimated_diagonal(self, NUM_SAMPLES, generator)
        return Estimate(exact, vectors.zeros_like(exact))

    def trace(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[float]:
        """The trace with its standard error; exact or estimated as `diagonal` is: see `estimated_trace`."""
        self.require_square("A.trace()")
        if num_samples is not None:
            return estimated_trace(self, _at_least_two(num_samples, "trace"), generator)
        exact = self._exact_diagonal()
        if exact is not None:
            return Estimate(float(sum(x.double().sum() for x in exact)), 0.0)
        if self.shape[0] <= EXACT_SIZE:
            return Estimate(float(self.to_dense().diagonal().double().sum()), 0.0)
        return estimated_trace(self, NUM_SAMPLES, generator)

    def _exact_diagonal(self) -> Vector | None:
        """The diagonal in closed form, for less than about `NUM_SAMPLES` products; None where there is none."""
        return None

    def blocks(self, groups: Sequence[Sequence[Tensor]] | None = None) -> LinearOperator:
        """A without the blocks that couple different groups of parameters, by default one group each: see `Blocks`."""
        from torchnewton.curvature.block_diagonal import Blocks  # which is an operator itself

        return Blocks(self, groups)

    def own(self) -> LinearOperator:
        """A as the samples of this process alone have it; A itself, unless several processes share the samples."""
        return self

    def to_scipy(self) -> Any:
        """A as `scipy.sparse.linalg.LinearOperator`: see `scipy_operator`."""
        return scipy_operator(self)

    def __add__(self, other: LinearOperator | float) -> LinearOperator:
        """A + B, or A + λI."""
        return Sum(self, other) if isinstance(other, LinearOperator) else Shifted(self, float(other))

    def __radd__(self, other: float) -> LinearOperator:
        """λI + A; 0 + A is A, as the built-in `sum` needs it."""
        return self + other if other else self

    def __sub__(self, other: LinearOperator | float) -> LinearOperator:
        """A − B, or A − λI."""
        return self + -other

    def __neg__(self) -> LinearOperator:
        """−A."""
        return Scaled(self, -1.0)

    def __mul__(self, factor: float) -> LinearOperator:
        """αA."""
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        """A/α."""
        return Scaled(self, 1 / float(divisor))


def _at_least_two(num_samples: int, name: str) -> int:
    if num_samples < 2:
        raise ValueError(f"A.{name}(): num_samples={num_samples} must be at least 2, or None for the exact value.")
    return num_samples


class Shifted(LinearOperator):
    """A + λI."""

    def __init__(self, base: LinearOperator, shift: float) -> None:
        base.require_square("A + λ")
        super().__init__(
            base.domain,
            base.codomain,
            is_symmetric=base.is_symmetric,
            is_positive_semidefinite=base.is_positive_semidefinite and shift >= 0,
            parts=[base],
        )
        self.base = base
        self.shift = shift

    def factored(self) -> tuple[Any, float] | None:
        """That of A, shifted."""
        found = self.base.factored()
        return None if found is None else (found[0], found[1] + self.shift)

    def quadratic_form(
        self, directions: Sequence[Sequence[Tensor]], gram: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """That of A, and λDᵀD."""
        form, num_products = self.base.quadratic_form(directions, gram)
        gram = vectors.inner_products(directions, directions) if gram is None else gram
        return form + self.shift * gram, num_products

    def own(self) -> LinearOperator:
        """That of A, shifted."""
        return Shifted(self.base.own(), self.shift)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return vectors.add(self.base.apply(v), v, self.shift)

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """(A + λI)ᵀu."""
        return vectors.add(self.base.adjoint(u), u, self.shift)

    def to_dense(self) -> Tensor:
        """The matrix; costs what that of A costs."""
        dense = self.base.to_dense().clone()
        dense.diagonal().add_(self.shift)
        return dense

    def diagonal(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[Vector]:
        """That of A, shifted."""
        base = self.base.diagonal(num_samples, generator)
        return Estimate([x + self.shift for x in base.value], base.standard_error)

    def trace(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[float]:
        """That of A, shifted."""
        base = self.base.trace(num_samples, generator)
        return Estimate(base.value + self.shift * self.shape[0], base.standard_error)


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

    def own(self) -> LinearOperator:
        """That of A, scaled."""
        return Scaled(self.base.own(), self.factor)

    def factored(self) -> tuple[Any, float] | None:
        """(√α·R, ασ); None unless α > 0."""
        found = self.base.factored() if self.factor > 0 else None
        return None if found is None else (ScaledRows(found[0], math.sqrt(self.factor)), self.factor * found[1])

    def costs(self, num_products: int = 1) -> Costs:
        """Those of A; there is no Gram matrix unless α > 0."""
        costs = self.base.costs(num_products)
        return costs if self.factor > 0 else costs.without_gram()

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return vectors.scale(self.base.apply(v), self.factor)

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """αAᵀu."""
        return vectors.scale(self.base.adjoint(u), self.factor)

    def to_dense(self) -> Tensor:
        """The matrix; costs what that of A costs."""
        return self.base.to_dense() * self.factor

    def diagonal(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[Vector]:
        """That of A, scaled."""
        base = self.base.diagonal(num_samples, generator)
        error = vectors.scale(base.standard_error, abs(self.factor))
        return Estimate(vectors.scale(base.value, self.factor), error)

    def trace(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[float]:
        """That of A, scaled."""
        base = self.base.trace(num_samples, generator)
        return Estimate(base.value * self.factor, base.standard_error * abs(self.factor))


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

    def own(self) -> LinearOperator:
        """The sum of the two."""
        return Sum(self.first.own(), self.second.own())

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return vectors.add(self.first.apply(v), self.second.apply(v))

    def adjoint(self, u: Sequence[Tensor]) -> Vector:
        """Aᵀu + Bᵀu."""
        return vectors.add(self.first.adjoint(u), self.second.adjoint(u))

    def quadratic_form(
        self, directions: Sequence[Sequence[Tensor]], gram: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """The sum of the two."""
        first, second = (part.quadratic_form(directions, gram) for part in (self.first, self.second))
        return first[0] + second[0], first[1] + second[1]

    def to_dense(self) -> Tensor:
        """The matrix; costs what those of A and B cost."""
        return self.first.to_dense() + self.second.to_dense()

    def diagonal(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[Vector]:
        """The sum of both, each with its own samples."""
        a, b = self.first.diagonal(num_samples, generator), self.second.diagonal(num_samples, generator)
        error = [torch.hypot(x, y) for x, y in zip(a.standard_error, b.standard_error, strict=True)]
        return Estimate(vectors.add(a.value, b.value), error)

    def trace(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[float]:
        """The sum of both, each with its own samples."""
        a, b = self.first.trace(num_samples, generator), self.second.trace(num_samples, generator)
        return Estimate(a.value + b.value, math.hypot(a.standard_error, b.standard_error))


class Diagonal(LinearOperator):
    """A diagonal matrix, given by its diagonal as a vector."""

    def __init__(self, entries: Sequence[Tensor]) -> None:
        positive = all(bool((d >= 0).all()) for d in entries)
        super().__init__(entries, entries, is_symmetric=True, is_positive_semidefinite=positive)
        self.entries = list(entries)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return [d * x for d, x in zip(self.entries, v, strict=True)]

    def costs(self, num_products: int = 1) -> Costs:
        """One operation an entry."""
        return Costs(product=float(self.shape[0]), dense=float(self.shape[0]))

    def to_dense(self) -> Tensor:
        """The matrix."""
        return torch.diag(vectors.flatten(self.entries))

    def diagonal(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[Vector]:
        """The entries, exactly."""
        return Estimate(list(self.entries), vectors.zeros_like(self.entries))

    def trace(self, num_samples: int | None = None, generator: torch.Generator | None = None) -> Estimate[float]:
        """The sum of the entries, exactly."""
        return Estimate(float(sum(x.double().sum() for x in self.entries)), 0.0)
