"""An operator as SciPy sees it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.vectors import Vector


class _Operator(Protocol):
    @property
    def domain(self) -> list[Tensor]: ...

    @property
    def codomain(self) -> list[Tensor]: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def apply(self, v: Vector) -> Vector: ...

    def adjoint(self, u: Vector) -> Vector: ...


def scipy_operator(A: _Operator) -> Any:
    """A `scipy.sparse.linalg.LinearOperator` with matvec, rmatvec and matmat on NumPy arrays.

    Its dtype is that of the parameters, float32 for half precision. Every product copies a vector each way.
    """
    try:
        linalg = importlib.import_module("scipy.sparse.linalg")
    except ImportError as error:
        raise ImportError('to_scipy() needs SciPy: pip install "torchnewton[scipy]"') from error
    device = A.domain[0].device
    dtype = torch.float64 if A.domain[0].dtype == torch.float64 else torch.float32

    def product(function: Callable[[Vector], Vector], like: list[Tensor]) -> Callable[[Any], Any]:
        def multiply(x: Any) -> Any:
            flat = torch.as_tensor(x.ravel(), dtype=dtype)
            parts = [part.to(device, t.dtype) for part, t in zip(vectors.unflatten(flat, like), like, strict=True)]
            return vectors.flatten([y.to("cpu", dtype) for y in function(parts)]).numpy()

        return multiply

    return linalg.LinearOperator(
        A.shape,
        matvec=product(A.apply, A.domain),
        rmatvec=product(A.adjoint, A.codomain),
        dtype=torch.empty(0, dtype=dtype).numpy().dtype,
    )
