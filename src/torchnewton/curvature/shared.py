"""What statistics of samples that are spread over several processes need of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = list[Tensor]


@dataclass(frozen=True)
class Rows:
    """This process's rows of random numbers that all have drawn alike: from `offset` on, of `total`.

    So random numbers belong to samples, wherever these are.
    """

    offset: int
    total: int

    def signs(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """±1 like a tensor with a row for each sample."""
        signs = torch.randint(2, self._shape(like), generator=generator, dtype=torch.int8)
        return self._mine(signs, like).mul_(2).sub_(1)

    def uniform(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Numbers between 0 and 1, likewise."""
        return self._mine(torch.rand(self._shape(like), generator=generator), like)

    def _shape(self, like: Tensor) -> tuple[int, ...]:
        return self.total, *like.shape[1:]

    def _mine(self, all_rows: Tensor, like: Tensor) -> Tensor:
        count = len(like) if like.dim() else 1
        return all_rows[self.offset : self.offset + count].reshape(like.shape).to(like.device, like.dtype, copy=True)


class Shared:
    """All samples are in this process; a subclass asks the others, which call the same methods in the same order."""

    rank = 0  # of this process
    has_samples = True  # that count

    def told(self, numbers: Sequence[float]) -> list[list[float]]:
        """Everyone's numbers, of any length, by rank: one message where they are the same, else two."""
        return [list(numbers)]

    def factors(self, left: Factors, right: Factors, holders: Sequence[Sequence[int]]) -> tuple[Factors, Factors]:
        """L and R of this process's samples → those of all: L is summed like f, R averaged over the samples.

        `holders` are the ranks that have each of the pairs; what others give does not count.
        """
        return left, right

    def rows(self, counts: Sequence[int]) -> list[Rows]:
        """Which rows of all are this process's, for several numbers of rows: its come after those of lower ranks."""
        return [Rows(0, count) for count in counts]

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Σ of everyone's numbers, but for those without a sample that counts."""
        return list(numbers)


def rows_of(tensors: Sequence[Tensor], shared: Shared) -> list[Rows]:
    """For tensors with a row for each sample: one message."""
    return shared.rows([len(x) if x.dim() else 1 for x in tensors])
