"""The rows of R = B^½J for a network of linear layers, by their inputs and cotangents in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.vectors import Vector


@dataclass(frozen=True)
class LinearBlock:
    """What a layer s = Wa + b contributes to the rows from `start` on, r for each sample: D_ni aₙᵀ in W, D_ni in b.

    `inputs` are a (N × K), with a column of ones behind where the bias is live; `cotangents` are D (N × r × O).
    """

    start: int
    inputs: Tensor
    cotangents: Tensor
    weight: int | None  # positions among the parameters
    bias: int | None

    @property
    def rows(self) -> slice:
        """Where in R."""
        return slice(self.start, self.start + self.cotangents.shape[0] * self.cotangents.shape[1])


class LinearRows:
    """R with one block for each layer and group of outputs, whatever the parameters' precision in float64.

    b − Rᵀw cancels by as many digits as the damping is small: here no digit is lost before. Cost: a product 2n(K + O)
    operations a layer, RRᵀ = Σ (A Aᵀ) ∘ (D Dᵀ) 2n²(K + O) and 3 passes over n² numbers.
    """

    def __init__(
        self,
        blocks: Sequence[LinearBlock],
        num_rows: int,
        like: Sequence[Tensor],
        preimage: Callable[[Sequence[Tensor]], Tensor | None],
    ) -> None:
        self.blocks = blocks
        self.num_rows = num_rows
        self.like = list(like)
        self.preimage = preimage

    def product(self, v: Sequence[Tensor]) -> Tensor:
        """Rv."""
        found = self._zeros(self.num_rows)
        for block in self.blocks:
            columns = [v[p].double().reshape(block.cotangents.shape[2], -1) for p in _positions(block)]
            moved = block.inputs @ torch.cat(columns, dim=1).mT
            found[block.rows] += torch.bmm(block.cotangents, moved.unsqueeze(2)).flatten()
        return found

    def adjoint(self, w: Tensor) -> Vector:
        """Rᵀw."""
        found = [torch.zeros_like(p, dtype=torch.float64) for p in self.like]
        for block in self.blocks:
            n, r, _ = block.cotangents.shape
            part = w[block.rows].double().view(n, 1, r)
            entries = torch.bmm(part, block.cotangents).squeeze(1).mT @ block.inputs
            if block.bias is not None:
                found[block.bias] += entries[:, -1].view_as(found[block.bias])
            if block.weight is not None:
                weight = found[block.weight]
                weight += entries[:, : weight.shape[1]]
        return found

    def gram(self, dtype: torch.dtype) -> Tensor:
        """RRᵀ."""
        total = self._zeros(self.num_rows, self.num_rows)
        for block in self.blocks:
            n, r, _ = block.cotangents.shape
            flat, part = block.cotangents.flatten(0, 1), total[block.rows, block.rows]
            pairs = (block.inputs @ block.inputs.mT).view(n, 1, n, 1)
            part.unflatten(0, (n, r)).unflatten(2, (n, r)).addcmul_((flat @ flat.mT).view(n, r, n, r), pairs)
        return total.to(dtype)

    def double(self) -> LinearRows:
        """R itself."""
        return self

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.like[0].device)


def _positions(block: LinearBlock) -> list[int]:
    return [p for p in (block.weight, block.bias) if p is not None]
