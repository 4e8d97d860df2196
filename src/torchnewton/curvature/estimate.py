"""Diagonal and trace of an operator from products with random signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.vectors import Vector

Value = TypeVar("Value", Vector, float)


@dataclass(frozen=True)
class Estimate(Generic[Value]):
    """A value and its standard error, both a vector like the parameters or both a number.

    The error of an exact value is 0; that of a mean is the standard deviation of the samples over the root of their
    number.
    """

    value: Value
    standard_error: Value


class _Operator(Protocol):
    @property
    def domain(self) -> list[Tensor]: ...

    def apply_each(self, vs: Sequence[Vector]) -> list[Vector]: ...


_CHUNK = 16  # vectors that are multiplied at once, for operators that run a closure again for each product


def estimated_diagonal(A: _Operator, num_samples: int, generator: torch.Generator | None) -> Estimate[Vector]:
    """The mean of v∘Av over vectors v of random signs.

    Cost: `num_samples` products. The variance of an entry is the sum of squares of the other entries of its row.
    Source: Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007.
    """
    mean, spread = vectors.zeros_like(A.domain), vectors.zeros_like(A.domain)
    for start in range(0, num_samples, _CHUNK):
        signs = [_random_signs(A.domain, generator) for _ in range(min(_CHUNK, num_samples - start))]
        for i, (v, y) in enumerate(zip(signs, A.apply_each(signs), strict=True), start + 1):
            for m, s, a, b in zip(mean, spread, v, y, strict=True):
                change = a * b - m
                m += change / i
                s += change * (a * b - m)
    error = [(s / (num_samples * (num_samples - 1))).sqrt() for s in spread]
    return Estimate(mean, error)


def estimated_trace(A: _Operator, num_samples: int, generator: torch.Generator | None) -> Estimate[float]:
    """Hutch++: the trace on the range of a sketch AS exactly, on what is orthogonal to it as the mean of gᵀAg.

    Cost: at most `num_samples` products, a third each for the sketch, its trace and the rest; memory: 2/3 of as many
    vectors. The error counts the rest only, which is the whole error: given the sketch the estimate is unbiased.
    Source: Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation", 2021, algorithm 1.
    """
    size = (num_samples - 2) // 3
    Q = _orthonormal(A.apply_each([_random_signs(A.domain, generator) for _ in range(size)]))
    exact = sum(vectors.dot(q, y) for q, y in zip(Q, A.apply_each(Q), strict=True))
    rest = []
    for _ in range(num_samples - 2 * size):
        g = _random_signs(A.domain, generator)
        _make_orthogonal(g, Q)
        rest.append(g)
    found = [vectors.dot(g, y) for g, y in zip(rest, A.apply_each(rest), strict=True)]
    mean = sum(found) / len(found)
    variance = sum((x - mean) ** 2 for x in found) / (len(found) - 1)
    return Estimate(exact + mean, math.sqrt(variance / len(found)))


def _random_signs(like: Sequence[Tensor], generator: torch.Generator | None) -> Vector:
    return [torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1 for x in like]


def _make_orthogonal(v: Vector, Q: Sequence[Vector]) -> None:
    """v ← (I − QQᵀ)v, twice, so that rounding leaves nothing."""
    for _ in range(2):
        for q in Q:
            vectors.add_(v, q, -vectors.dot(q, v))


def _orthonormal(columns: Sequence[Vector]) -> list[Vector]:
    """An orthonormal basis of what the columns span, by Gram-Schmidt."""
    Q: list[Vector] = []
    for column in columns:
        q = vectors.clone(column)
        before = vectors.norm(q)
        _make_orthogonal(q, Q)
        after = vectors.norm(q)
        if after > 100 * torch.finfo(q[0].dtype).eps * before:
            Q.append(vectors.scale(q, 1 / after))
    return Q
