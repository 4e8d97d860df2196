"""Blocks of the data in turn, for the curvature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Subsets:
    """The data cut in equal blocks after a shuffle; each `next` gives the next block, shuffled anew after each pass.

        subsets = tn.Subsets(len(x), fraction=0.05)
        optimizer.step(data, curvature=tn.over(next(subsets).split(1024), loss_of_indices))

    A block is a tensor of numbers below `num_samples`; 1/`fraction` rounded is the number of blocks, whose sizes
    differ by one at most. The shuffles come from `seed`: `block(k)`, the k-th from the start, is a function of the
    arguments alone, and `state_dict` holds the position.

    Source: the subsampled Gauss-Newton matrix of simpleNN, see `NewtonCG`.
    """

    def __init__(self, num_samples: int, fraction: float = 0.05, seed: int = 0) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"Subsets: fraction={fraction} must be greater than 0 and at most 1.")
        if not num_samples >= 1:
            raise ValueError(f"Subsets: num_samples={num_samples} must be at least 1.")
        self.num_samples, self.fraction, self.seed = num_samples, fraction, seed
        self.num_blocks = min(num_samples, max(1, round(1 / fraction)))
        self.position = 0

    def block(self, number: int) -> Tensor:
        """The sample numbers of a block."""
        round_, place = divmod(number, self.num_blocks)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(1 + round_):
            order = torch.randperm(self.num_samples, generator=generator)
        return order.tensor_split(self.num_blocks)[place]

    def __iter__(self) -> Subsets:
        return self

    def __next__(self) -> Tensor:
        block = self.block(self.position)
        self.position += 1
        return block

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from it."""
        self.position = state["position"]
