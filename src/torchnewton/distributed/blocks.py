"""The parameters cut into one block for each rank, and the diagonal blocks of an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchnewton.costs import Costs
from torchnewton.curvature import LinearOperator
from torchnewton.distributed.processes import Processes
from torchnewton.vectors import Vector, flatten, unflatten, zeros_like


@dataclass(frozen=True)
class Partition:
    """All entries of the parameters in their order, cut into `num_blocks` ranges whose lengths differ by one at most.

    Entries of a weight are ordered by output neuron, so that a block is a set of layers and, where a layer is cut, a
    range of its neurons.
    """

    shapes: tuple[torch.Size, ...]
    num_blocks: int

    @property
    def bounds(self) -> list[int]:
        """The first entry of every block, and the number of entries."""
        total = sum(shape.numel() for shape in self.shapes)
        return [total * i // self.num_blocks for i in range(self.num_blocks + 1)]

    @property
    def sizes(self) -> list[int]:
        """The lengths of the blocks."""
        bounds = self.bounds
        return [stop - start for start, stop in pairwise(bounds)]

    def ranges(self, block: int) -> list[tuple[int, int, int]]:
        """(position of a parameter, first entry, end) of what belongs to the block."""
        start, stop = self.bounds[block : block + 2]
        found, offset = [], 0
        for position, shape in enumerate(self.shapes):
            first, end = max(start - offset, 0), min(stop - offset, shape.numel())
            if first < end:
                found.append((position, first, end))
            offset += shape.numel()
        return found


class RangeBlocks:
    """What the ranks solve for where every rank has the whole model: the ranges of a `Partition`.

    In the `turn`-th solve rank p has the block p + turn.
    """

    def __init__(self, like: Sequence[Tensor], processes: Processes, turn: int = 0) -> None:
        self.processes = processes
        self.partition = Partition(tuple(x.shape for x in like), processes.size)
        self.owners = [(rank + turn) % processes.size for rank in range(processes.size)]
        self.ranges = self.partition.ranges(self.owners[processes.rank])

    @property
    def spent(self) -> int:
        """Bytes exchanged so far."""
        return self.processes.bytes

    def block(self, A: LinearOperator) -> LinearOperator:
        """This rank's, from its own samples."""
        return DiagonalBlock(A.own(), self.ranges)

    def cut(self, v: Sequence[Tensor]) -> Vector:
        """This rank's part of a vector."""
        return [v[i].reshape(-1)[first:end] for i, first, end in self.ranges]

    def joined(self, d: Sequence[Tensor], like: Sequence[Tensor]) -> Vector:
        """Every rank's part, in its place: one message."""
        sizes = [self.partition.sizes[block] for block in self.owners]
        mine = flatten(d) if d else like[0].new_zeros(0)
        parts = dict(zip(self.owners, self.processes.joined(mine, sizes).split(sizes), strict=True))
        return unflatten(torch.cat([parts[block] for block in range(self.processes.size)]), like)


class DiagonalBlock(LinearOperator):
    """The square block of A that belongs to the entries `ranges` of its domain, on flat pieces of the parameters.

    Cost: a product with A. Memory: a vector like the parameters within a product; vectors of the block else.
    """

    def __init__(self, base: LinearOperator, ranges: Sequence[tuple[int, int, int]]) -> None:
        pieces = [base.domain[i].detach().reshape(-1)[first:end] for i, first, end in ranges]
        super().__init__(
            pieces,
            pieces,
            is_symmetric=base.is_symmetric,
            is_positive_semidefinite=base.is_positive_semidefinite,
        )
        self.base = base
        self.ranges = list(ranges)

    def cut(self, v: Sequence[Tensor]) -> Vector:
        """The block's part of a vector like the parameters."""
        return [v[i].reshape(-1)[first:end] for i, first, end in self.ranges]

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        whole = zeros_like(self.base.domain)
        for (i, first, end), piece in zip(self.ranges, v, strict=True):
            whole[i].view(-1)[first:end] = piece
        return self.cut(self.base.apply(whole))

    def to_dense(self) -> Tensor:
        """The matrix; costs what that of A costs."""
        offsets = [0]
        for x in self.base.domain:
            offsets.append(offsets[-1] + x.numel())
        kept = torch.cat([torch.arange(offsets[i] + first, offsets[i] + end) for i, first, end in self.ranges])
        dense = self.base.to_dense()
        kept = kept.to(dense.device)
        return dense[kept][:, kept]

    def costs(self, num_products: int = 1) -> Costs:
        """Products and matrix as for A."""
        costs = self.base.costs(num_products)
        return Costs(costs.product, costs.setup, costs.dense)

    def expect(self, num_products: int) -> None:
        """As A."""
        self.base.expect(num_products)

    def can_factor(self) -> bool:
        """As A."""
        return self.base.can_factor()

    @property
    def path(self) -> str:
        """As A."""
        return self.base.path
