"""What a solver may know of an operator beside its products: A = RᵀR + σI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from torchnewton.vectors import Vector


class Rows(Protocol):
    """R, known by its products and by RRᵀ."""

    @property
    def num_rows(self) -> int:
        """n."""
        ...

    def product(self, v: Sequence[Tensor], /) -> Tensor:
        """Rv."""
        ...

    def adjoint(self, w: Tensor, /) -> Vector:
        """Rᵀw."""
        ...

    def gram(self, dtype: torch.dtype, /) -> Tensor:
        """RRᵀ."""
        ...

    def double(self) -> Rows | None:
        """R in float64, in products and Gram matrix alike, where that is cheap."""
        ...

    def preimage(self, b: Sequence[Tensor], /) -> Tensor | None:
        """y with Rᵀy = b to rounding, where one is known without a solve."""
        ...


class Factor(Rows, Protocol):
    """R whose matrix can be formed."""

    def normal_equations(self, y: Tensor | None, dtype: torch.dtype, /) -> tuple[Tensor, Tensor | None]:
        """RᵀR and, for a y, Rᵀy, computed in `dtype`."""
        ...


@runtime_checkable
class Factored(Protocol):
    """An operator that knows A = RᵀR + σI."""

    def factored(self) -> tuple[Factor, float] | None:
        """(R, σ), or None."""
        ...
