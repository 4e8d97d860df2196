"""Preconditioners from what is known of A: its diagonal, its diagonal blocks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from torchnewton.vectors import Vector, flatten, unflatten


class Preconditioner(ABC):
    """`M @ v` for a list of tensors like `like`, or for one flat tensor."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.like = list(like)

    @abstractmethod
    def apply(self, v: Sequence[Tensor]) -> Vector:
        """The product with a list of tensors."""

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: Sequence[Tensor]) -> Vector: ...
    def __matmul__(self, v: Tensor | Sequence[Tensor]) -> Tensor | Vector:
        """M @ v."""
        return flatten(self.apply(unflatten(v, self.like))) if isinstance(v, Tensor) else self.apply(v)


class Jacobi(Preconditioner):
    """M = (diag(d) + λI)^−exponent for the diagonal d of A, as a vector, and λ = `damping`.

    Cost: one multiplication an entry; memory: one vector. Errors: `ValueError` where d + λ is not positive.
    Source: Martens, "Deep learning via Hessian-free optimization", ICML 2010, section 4.7, for the exponent 0.75.

    >>> Jacobi([torch.tensor([1.0, 3.0])], damping=1.0) @ torch.tensor([2.0, 2.0])
    tensor([1.0000, 0.5000])
    """

    def __init__(self, diagonal: Sequence[Tensor], damping: float = 0.0, exponent: float = 1.0) -> None:
        super().__init__(diagonal)
        if any(bool((d + damping <= 0).any()) for d in diagonal):
            raise ValueError(f"Jacobi: diagonal + damping must be positive; raise damping={damping}.")
        self.factors = [(d + damping).pow(-exponent) for d in diagonal]

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `Preconditioner.apply`."""
        return [f * x for f, x in zip(self.factors, v, strict=True)]


class BlockDiagonal(Preconditioner):
    """M = blockdiag(A₁ + λI, A₂ + λI, …)⁻¹ for one dense block per parameter and λ = `damping`.

    Cost: Σ pᵢ³/3 operations once, 2pᵢ² a product; memory: Σ pᵢ². The factors are in the dtype of the blocks.
    Errors: `ValueError` for a block that is not positive definite with λ.

    >>> BlockDiagonal([torch.tensor([[2.0, 1.0], [1.0, 2.0]])], damping=0.0) @ torch.tensor([3.0, 0.0])
    tensor([ 2.0000, -1.0000])
    """

    def __init__(self, blocks: Sequence[Tensor], damping: float = 0.0) -> None:
        super().__init__([block.diagonal() for block in blocks])
        self.factors: Vector = []
        for i, block in enumerate(blocks):
            shifted = block.clone()
            shifted.diagonal().add_(damping)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if int(info) > 0 and bool(torch.isfinite(shifted).all()):
                raise ValueError(f"BlockDiagonal: block {i} is not positive definite; raise damping={damping}.")
            # A block that is not finite is for the solver to report.
            self.factors.append(factor if int(info) == 0 else torch.full_like(block, math.nan))

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `Preconditioner.apply`."""
        return [
            torch.cholesky_solve(x.reshape(-1, 1), factor).view(x.shape)
            for x, factor in zip(v, self.factors, strict=True)
        ]
