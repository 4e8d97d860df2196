"""What an operator costs, in floating-point operations: the numbers by which a solver is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Costs:
    """Operations of one product, of the dense matrix, and of a factor R with A = RᵀR + σI and `factor_rows` rows."""

    product: float = 0.0
    dense: float = math.inf
    factor: float = math.inf
    factor_rows: int = 0

    def __add__(self, other: Costs) -> Costs:
        """The costs of a sum of two operators, which has no factor."""
        return Costs(self.product + other.product, self.dense + other.dense)


@runtime_checkable
class StatesCosts(Protocol):
    """An operator that knows its costs."""

    def costs(self) -> Costs:
        """What a product, the dense matrix and a factor cost."""
        ...

    def can_form_dense(self) -> bool:
        """Whether matrix and factor are to be had at that cost; the work to find out is kept."""
        ...
