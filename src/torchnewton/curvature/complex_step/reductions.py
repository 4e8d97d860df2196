"""Sums of products along dimensions: moments, norms, distances, products, and a few matrix functions."""

from __future__ import annotations

import math
from functools import reduce
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from torchnewton.curvature.complex_step.pair import ComplexPair, keeps_squares, re, rule
from torchnewton.record import RecordError


@rule("prod")
def prod(input: ComplexPair, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """The product of the entries, one after the other."""
    z: Any = input if dtype is None else input.to(dtype)
    if dim is None:
        return reduce(mul, z.reshape(-1).unbind(0))
    value = reduce(mul, z.unbind(dim))
    return value.unsqueeze(dim) if keepdim else value


@rule("cumprod")
def cumprod(input: ComplexPair, dim: int) -> Any:
    """The products of the first entries."""
    return torch.stack(list(accumulate(input.unbind(dim), mul)), dim)


@rule("logcumsumexp")
def logcumsumexp(input: ComplexPair, dim: int) -> Any:
    """log of the sums of the first exponentials."""
    return torch.stack(list(accumulate(input.unbind(dim), torch.logaddexp)), dim)


def _count(input: Tensor, dim: Any) -> int:
    dims = range(input.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    return math.prod(input.shape[d] for d in dims)


@rule("var")
def var(input: ComplexPair, dim: Any = None, unbiased: bool = True, keepdim: bool = False, **named: Any) -> Any:
    """Σ(z − mean)²/(n − correction)."""
    if isinstance(dim, bool):  # var(unbiased)
        dim, unbiased = None, dim
    correction = named.get("correction", 1 if unbiased else 0)
    n = _count(input, dim)
    centred = input - (input.mean() if dim is None else input.mean(dim, keepdim=True))
    squares = centred * centred
    total = squares.sum() if dim is None else squares.sum(dim, keepdim=keepdim)
    return total / max(n - (1 if correction is None else correction), 0)


@rule("std")
def std(input: ComplexPair, *args: Any, **named: Any) -> Any:
    """The root of the variance."""
    return root(var(input, *args, **named))


@rule("var_mean")
def var_mean(input: ComplexPair, dim: Any = None, *args: Any, **named: Any) -> Any:
    """Variance and mean."""
    keepdim = bool(named.get("keepdim", args[1] if len(args) > 1 else False))
    mean = input.mean() if dim is None or isinstance(dim, bool) else input.mean(dim, keepdim=keepdim)
    return var(input, dim, *args, **named), mean


@rule("std_mean")
def std_mean(input: ComplexPair, dim: Any = None, *args: Any, **named: Any) -> Any:
    """Standard deviation and mean."""
    variance, mean = var_mean(input, dim, *args, **named)
    return root(variance), mean


def root(square: Any) -> Any:
    """√z with slope 0 at 0, as autograd has it for norms."""
    at_zero = re(square) == 0
    return torch.where(at_zero, 0.0, torch.sqrt(torch.where(at_zero, 1.0, square)))


@rule("norm", "vector_norm")
def vector_norm(
    input: ComplexPair, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> Any:
    """(Σ|z|ᵖ)^(1/p), |z| by the sign of the real part."""
    z: Any = input if dtype is None else input.to(dtype)
    if isinstance(dim, (list, tuple)) and not dim:
        dim = None
    where = () if dim is None else (dim, keepdim)
    if ord in (2, None, "fro"):
        value = root((z * z).sum(*where))
    elif ord == 1:
        value = z.abs().sum(*where)
    elif ord == math.inf:
        value = z.abs().amax(*where)
    elif ord == -math.inf:
        value = z.abs().amin(*where)
    elif ord == 0:
        return (re(z) != 0).to(z.dtype).sum(*where)
    else:
        total = (z.abs() ** ord).sum(*where)
        at_zero = re(total) == 0
        value = torch.where(at_zero, 0.0, torch.where(at_zero, 1.0, total) ** (1 / ord))
    return value.reshape([1] * z.dim()) if dim is None and keepdim else value


@rule("norm_except_dim")
def norm_except_dim(v: ComplexPair, pow: float = 2, dim: int = 0) -> Any:
    """The norm of each slice along `dim`, of the weight normalization."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    return vector_norm(v, pow) if dim == -1 else vector_norm(v, pow, others, True)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(v: Any, g: Any, dim: int = 0) -> Any:
    """gv/‖v‖."""
    return v * (g / (torch.norm_except_dim(v, 2, dim)))


@rule("frobenius_norm")
def frobenius_norm(input: ComplexPair, dim: Any = None, keepdim: bool = False) -> Any:
    """The root of the sum of squares."""
    return vector_norm(input, 2, dim, keepdim)


@rule("linalg_norm")
def linalg_norm(input: ComplexPair, ord: Any = None, dim: Any = None, keepdim: bool = False, **named: Any) -> Any:
    """Of vectors, or the Frobenius norm of matrices."""
    of_matrices = input.dim() == 2 if dim is None else isinstance(dim, (list, tuple)) and len(dim) == 2
    if ord is not None and of_matrices:
        return matrix_norm(input, ord, dim or (-2, -1), keepdim, **named)
    return vector_norm(input, 2 if ord is None else ord, dim, keepdim, **named)


@rule("matrix_norm")
def matrix_norm(input: ComplexPair, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, **named: Any) -> Any:
    """The Frobenius norm."""
    if ord != "fro":
        raise RecordError(f"the complex step knows the Frobenius norm of a matrix, not ord={ord!r}: take tn.Hessian.")
    return vector_norm(input, 2, dim, keepdim, **named)


@rule("dist")
def dist(input: Any, other: Any, p: float = 2) -> Any:
    """The norm of the difference."""
    return vector_norm(input - other, p)


@rule("pairwise_distance")
def pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    """The norm of the differences, shifted by eps, along the last dimension."""
    return vector_norm(x1 - x2 + eps, p, -1, keepdim)


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    """The norms of all differences."""
    return vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


@rule("pdist")
def pdist(input: Any, p: float = 2.0) -> Any:
    """The norms of the differences of rows."""
    i, j = torch.triu_indices(input.shape[0], input.shape[0], 1, device=input.device)
    return vector_norm(input[i] - input[j], p, -1)


@rule("cosine_similarity")
def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """x₁ᵀx₂ over the product of the norms, each at least eps."""
    norms = [_vector_norm(x, dim).clamp_min(eps) for x in (x1, x2)]
    return ((x1 / norms[0]) * (x2 / norms[1])).sum(dim)


def _vector_norm(x: Any, dim: int) -> Any:
    return torch.linalg.vector_norm(x, 2, dim, keepdim=True)


@rule("renorm")
def renorm(input: ComplexPair, p: float, dim: int, maxnorm: float) -> Any:
    """Slices with a norm of at most `maxnorm`."""
    others = [d for d in range(input.dim()) if d != dim % input.dim()]
    size = vector_norm(input, p, others, True)
    return torch.where(re(size) > maxnorm, input * (maxnorm / (size + 1e-7)), input)


# --- matrices --------------------------------------------------------------------------------------------------------


@rule("inv", "inverse")
def inv(A: ComplexPair) -> ComplexPair:
    """X = A⁻¹: (X, −X Y X)."""
    if keeps_squares():
        w = torch.linalg.inv(torch.complex(A.re, A.im))
        return ComplexPair(w.real, w.imag)
    X = torch.linalg.inv(A.re)
    return ComplexPair(X, -X @ A.im @ X)


@rule("solve", "linalg_solve")
def solve(A: Any, B: Any, *, left: bool = True) -> Any:
    """A⁻¹B."""
    inverse: Any = torch.linalg.inv(A)
    return inverse @ B if left else B @ inverse


@rule("det")
def det(A: ComplexPair) -> ComplexPair:
    """det A."""
    if keeps_squares():
        w = torch.linalg.det(torch.complex(A.re, A.im))
        return ComplexPair(w.real, w.imag)
    value = torch.linalg.det(A.re)
    return ComplexPair(value, value * _trace_of_quotient(A))


@rule("logdet")
def logdet(A: ComplexPair) -> Any:
    """log det A."""
    return torch.log(det(A)) if keeps_squares() else ComplexPair(torch.logdet(A.re), _trace_of_quotient(A))


def _trace_of_quotient(A: ComplexPair) -> Tensor:
    quotient: Tensor = torch.linalg.solve(A.re, A.im)
    return quotient.diagonal(dim1=-2, dim2=-1).sum(-1)
