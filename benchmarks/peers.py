"""curvlinops, the library of curvature operators that the products are compared with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import curvlinops
    VERSION = metadata.version("curvlinops-for-pytorch")
except ImportError:  # what is measured already can be shown without
    curvlinops, VERSION = None, ""


def require() -> None:
    """Ends the program where curvlinops is missing."""
    if curvlinops is None:
        sys.exit("curvlinops is missing: `make bench-products` installs it.")


class PlaceLoss(nn.CrossEntropyLoss):
    """Cross entropy of the places of sequences."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return super().forward(output.flatten(0, -2), y.flatten())


def gauss_newton(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """The Gauss-Newton operator of curvlinops on one batch; `A @ v` with a list of tensors."""
    loss: nn.Module = nn.MSELoss() if y.is_floating_point() else PlaceLoss()
    params = list(model.parameters())
    return curvlinops.GGNLinearOperator(model, loss, params, [(x, y)], check_deterministic=False)


def product(operator: Any, v: Sequence[Tensor]) -> list[Tensor]:
    """Forward mode needs the plain attention."""
    with sdpa_kernel(SDPBackend.MATH):
        found: list[Tensor] = operator @ list(v)
    return found


def damped_solution(
    operator: Any, b: Iterable[Tensor], damping: float, rtol: float, max_iterations: int
) -> tuple[Tensor, int]:
    """SciPy's CG on G + λI, in single precision; the flat solution and the number of iterations."""
    G = operator.to_scipy(dtype=np.float32)

    def damped(v: Any) -> Any:
        return G @ v + np.float32(damping) * v

    count = 0

    def counting(_: Any) -> None:
        nonlocal count
        count += 1

    A = LinearOperator(G.shape, matvec=damped, dtype=np.float32)
    flat = torch.cat([t.flatten() for t in b]).numpy()
    x, _ = cg(A, flat, rtol=rtol, maxiter=max_iterations, callback=counting)
    return torch.from_numpy(x), count
