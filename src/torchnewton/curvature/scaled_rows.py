"""R with αA = RᵀR, from the rows of A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchnewton.vectors import Vector


class ScaledRows:
    """√α·R for the R of another operator: see `torchnewton.solvers.rows.Factor`."""

    def __init__(self, base: Any, root: float) -> None:
        self.base, self.root = base, root

    @property
    def num_rows(self) -> int:
        """As R."""
        return int(self.base.num_rows)

    def product(self, v: Sequence[Tensor]) -> Tensor:
        """√α·Rv."""
        found: Tensor = self.base.product(v) * self.root
        return found

    def adjoint(self, w: Tensor) -> Vector:
        """√α·Rᵀw."""
        found: Vector = self.base.adjoint(w * self.root)
        return found

    def gram(self, dtype: torch.dtype) -> Tensor:
        """α·RRᵀ."""
        found: Tensor = self.base.gram(dtype) * self.root**2
        return found

    def double(self) -> ScaledRows | None:
        """The same in float64, where R has it cheaply."""
        double = self.base.double()
        return None if double is None else ScaledRows(double, self.root)

    def preimage(self, b: Sequence[Tensor]) -> Tensor | None:
        """y/√α for the y with Rᵀy = b."""
        y = self.base.preimage(b)
        return None if y is None else y / self.root

    def normal_equations(self, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """α·RᵀR and √α·Rᵀy."""
        matrix, rhs = self.base.normal_equations(y, dtype)
        return matrix * self.root**2, None if rhs is None else rhs * self.root
