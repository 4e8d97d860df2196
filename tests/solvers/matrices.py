"""One table of systems for all solvers, in float64."""

from __future__ import annotations

import numpy as np
import torch

from torchnewton.vectors import flatten, unflatten

SHAPES = [(2, 3), (), (1, 4, 1), (5,), (1, 1)]  # 17 entries in several tensors, a scalar among them


def spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


def random(size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class OnLists:
    """A stored matrix as an operator on lists of tensors in the given shapes."""

    def __init__(self, matrix, shapes):
        self.matrix, self.like = matrix, [torch.zeros(shape, dtype=matrix.dtype) for shape in shapes]

    def __matmul__(self, v):
        assert [x.shape for x in v] == [x.shape for x in self.like]
        return unflatten(self.matrix @ flatten(v), self.like)


DEFINITE = {
    "one": torch.tensor([[2.0]], dtype=torch.float64),
    "identity": torch.eye(6, dtype=torch.float64),
    "spread": spectrum(list(np.geomspace(1e-2, 1e2, 8))),
    "clustered": spectrum([1.0] * 5 + [50.0] * 5),
    "ill-conditioned": spectrum([1e-6, 1e-3, 1.0, 10.0]),
    "seventeen": spectrum(list(np.linspace(1, 20, 17))),
}
INDEFINITE = {
    "negative one": torch.tensor([[-2.0]], dtype=torch.float64),
    "exchange": torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
    "mixed": spectrum([-5.0, -1.0, 0.5, 1.0, 2.0, 9.0]),
    "one negative": spectrum([-1e-2, *np.geomspace(0.1, 10, 9)]),
}
SINGULAR = {
    "semidefinite": spectrum([0.0, 0.0, 1.0, 2.0, 7.0]),
    "singular indefinite": spectrum([-3.0, -1.0, 0.0, 0.0, 2.0, 5.0]),
    "zero": torch.zeros(3, 3, dtype=torch.float64),
}
