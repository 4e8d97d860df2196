"""Block-diagonal matrices whose blocks are Kronecker products of two small factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.costs import Costs
from torchnewton.curvature.operator import LinearOperator
from torchnewton.vectors import Vector, zeros_like


@dataclass(frozen=True)
class Block:
    """L ⊗ R in each of g groups, for some parameters side by side as V, g × O × K: V ↦ LVR.

    `positions` are those of the parameters; each is read as g × O × (its share of K), so that a weight and its bias
    become [W b]. `left` is L, g × O × O, or its diagonal, g × O; `right` is R, g × K × K, or its diagonal, g × K.
    A block with O = 1 and L = 1 is any matrix R of its parameters.
    """

    positions: tuple[int, ...]
    left: Tensor
    right: Tensor

    def side_by_side(self, v: Sequence[Tensor]) -> Tensor:
        """V from a list of tensors like all parameters."""
        parts = [v[p].reshape(*self.left.shape[:2], -1).to(self.right.dtype) for p in self.positions]
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def apart(self, V: Tensor, like: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        """The parameters' shares of V, by position; contiguous: one copy here spares one in every inner product."""
        shares = V.split([like[p].numel() // V.shape[:2].numel() for p in self.positions], dim=2)
        return [
            (p, x.contiguous().view(like[p].shape).to(like[p].dtype))
            for p, x in zip(self.positions, shares, strict=True)
        ]

    def product(self, V: Tensor) -> Tensor:
        """LVR."""
        return _times(self.left, _times(self.right, V.mT).mT)

    def diagonal(self) -> Tensor:
        """The diagonal as a V."""
        return diagonal_of(self.left).unsqueeze(2) * diagonal_of(self.right).unsqueeze(1)

    def is_finite(self) -> bool:
        """Whether all entries are, for positive semidefinite L and R, whose diagonals bound the others."""
        return all(math.isfinite(diagonal_of(factor).sum()) for factor in (self.left, self.right))

    @property
    def flops(self) -> float:
        """Operations of a product."""
        entries = self.left.shape[:2].numel() * self.right.shape[1]
        return 2.0 * entries * sum(factor.shape[1] for factor in (self.left, self.right) if factor.dim() == 3)


def diagonal_of(factor: Tensor) -> Tensor:
    """g × n."""
    return factor if factor.dim() == 2 else factor.diagonal(dim1=1, dim2=2)


def _times(factor: Tensor, V: Tensor) -> Tensor:
    """Factor · V, V g × n × m."""
    return factor.unsqueeze(2) * V if factor.dim() == 2 else torch.bmm(factor, V)


class KroneckerBlocks(LinearOperator):
    """The block-diagonal matrix of some `Block`s; zero for parameters that are in none of them.

    Cost of a product: O²K + OK² multiplications for a block. Errors: none of its own.

    >>> block = Block((0,), torch.tensor([[2.0]]), torch.tensor([[[1.0, 1.0], [1.0, 2.0]]]))
    >>> KroneckerBlocks([torch.zeros(2), torch.zeros(1)], [block]) @ torch.ones(3)
    tensor([4., 6., 0.])
    """

    def __init__(self, params: Sequence[Tensor], blocks: Sequence[Block]) -> None:
        super().__init__(params, params, is_symmetric=True, is_positive_semidefinite=True)
        self.kronecker_blocks = list(blocks)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        found = zeros_like(v)
        for block in self.kronecker_blocks:
            for p, x in block.apart(block.product(block.side_by_side(v)), v):
                found[p] = x
        return found

    def costs(self, num_products: int = 1) -> Costs:
        """Products by factors."""
        product = sum((block.flops for block in self.kronecker_blocks), 0.0)
        return Costs(product=product, dense=product * self.shape[1])

    def _exact_diagonal(self) -> Vector:
        found = zeros_like(self.domain)
        for block in self.kronecker_blocks:
            for p, x in block.apart(block.diagonal(), self.domain):
                found[p] = x
        return found
