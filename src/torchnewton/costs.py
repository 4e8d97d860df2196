"""What an operator costs, in floating-point operations: the numbers by which a solver is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Costs:
    """Operations of one product and of what comes before the first, of the dense matrix, and of the Gram matrix RRᵀ
    with A = RᵀR + σI and R of `gram_rows` rows, each with all it needs beside the tape.

    What is no arithmetic but takes time counts as the operations that take as long; `dense_overhead` and
    `gram_overhead` are these parts of `dense` and `gram`.
    """

    product: float = 0.0
    setup: float = 0.0
    dense: float = math.inf
    gram: float = math.inf
    gram_rows: int = 0
    dense_overhead: float = 0.0
    gram_overhead: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        """The costs of a sum of two operators, which has no R."""
        return Costs(
            self.product + other.product,
            self.setup + other.setup,
            self.dense + other.dense,
            dense_overhead=self.dense_overhead + other.dense_overhead,
        )

    def without_gram(self) -> Costs:
        """Those of an operator that has no R."""
        return Costs(self.product, self.setup, self.dense, dense_overhead=self.dense_overhead)

    @property
    def dense_flops(self) -> float:
        """The arithmetic of the dense matrix alone."""
        return self.dense - self.dense_overhead

    @property
    def gram_flops(self) -> float:
        """The arithmetic of the Gram matrix alone."""
        return self.gram - self.gram_overhead


@runtime_checkable
class StatesCosts(Protocol):
    """An operator that knows its costs."""

    def costs(self, num_products: int) -> Costs:
        """What `num_products` products, the dense matrix or the Gram matrix would cost."""
        ...

    def expect(self, num_products: int) -> None:
        """Be told how many products will follow, so that work that pays only for many is done for many."""
        ...

    def can_factor(self) -> bool:
        """Whether the dense matrix and the Gram matrix are to be had at that cost; the work to find out is kept."""
        ...


def cholesky_flops(size: int) -> float:
    """Operations of a Cholesky factorization."""
    return size**3 / 3
