"""(L ⊗ R + λI)⁻¹ for every λ, from the leading eigenpairs of L and R."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from torchnewton.costs import Costs
from torchnewton.curvature.kfac.blocks import Block, diagonal_of
from torchnewton.curvature.operator import LinearOperator
from torchnewton.vectors import Vector

_SMALL = 128  # up to this size all eigenpairs are found
_OVERSAMPLING = 8
_POWER_STEPS = 2
_LEAST = 32  # eigenpairs
_STEP = 16  # matrix products are faster for multiples


Weights: TypeAlias = tuple[Tensor, Tensor | None]  # of what is in a basis, and of the rest


@dataclass(frozen=True)
class Eigenpairs:
    """UeUᵀ + τ(I − UUᵀ) for each of g groups: `values` e, g × k, `basis` U, g × n × k, `tail` τ, g × 1.

    τ is the mean of the eigenvalues that are left out, so that the trace is right. `tail` is None where none is, and
    `basis` too for a diagonal matrix.
    """

    values: Tensor
    basis: Tensor | None
    tail: Tensor | None

    @classmethod
    def of(cls, factor: Tensor, share: float) -> Eigenpairs:
        """About share · n leading eigenpairs of a factor n × n, at least 32; all where that is half of them or more.

        Cost: two steps of subspace iteration, 3n²k multiplications; all eigenpairs, for n ≤ 128 or k ≥ n/2, about 9n³.
        Source: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53, 2011, algorithm 4.4;
        for K-FAC, Puiu, "Randomized K-FACs", arXiv 2206.15397.
        """
        if factor.dim() == 2:
            return cls(factor, None, None)
        size = factor.shape[1]
        rank = max(_STEP * round(share * size / _STEP), _LEAST)
        if size <= _SMALL or 2 * rank >= size:
            values, basis = torch.linalg.eigh(factor)
            return cls(values.clamp(min=0), basis, None)
        values, basis = _leading(factor, rank)
        left_out = (diagonal_of(factor).sum(1) - values.sum(1)) / (size - rank)
        return cls(values, basis, left_out.clamp(min=0).unsqueeze(1))

    def weights(self, weight: Callable[[Tensor], Tensor]) -> Weights:
        """Those of w(this matrix) for a function `weight` of eigenvalues g × k × 1, for every column or all columns."""
        of_values = weight(self.values.unsqueeze(2))
        if self.tail is None:
            return of_values, None
        rest = weight(self.tail.unsqueeze(2))
        return of_values - rest, rest

    def filtered(self, V: Tensor, weights: Weights) -> Tensor:
        """w(this matrix) · V for V g × n × m."""
        inner, rest = weights
        if self.basis is None:
            return inner * V
        span = (self.basis.mT @ V).mul_(inner)
        return self.basis @ span if rest is None else (rest * V).baddbmm_(self.basis, span)


def _leading(factor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (factor.shape[1], rank + _OVERSAMPLING)
    start = torch.randn(shape, generator=generator, dtype=torch.float64).to(factor)
    Q = start.expand(len(factor), -1, -1)
    for _ in range(_POWER_STEPS):
        Q = torch.linalg.qr(factor @ Q).Q
    values, vectors = torch.linalg.eigh(Q.mT @ (factor @ Q))
    return values[:, -rank:].clamp(min=0), Q @ vectors[:, :, -rank:]


class KroneckerInverse(LinearOperator):
    """(⊕ L ⊗ R + λI)⁻¹ for the spectra of L and R of some blocks, by the positions of their parameters.

    With R = Σ r wwᵀ the product is Σ (rL + λI)⁻¹ V wwᵀ, and likewise for L: exact for the spectra. Symmetric positive
    definite for every λ > 0. Parameters of no block are divided by λ.

    Cost of a product: 2OK(k_L + k_R) multiplications for a block with k_L and k_R eigenpairs; another λ costs nothing.
    Memory: the weights of the eigenpairs, at most OK numbers for a block.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        blocks: Sequence[Block],
        spectra: Mapping[tuple[int, ...], tuple[Eigenpairs, Eigenpairs]],
        damping: float,
    ) -> None:
        super().__init__(params, params, is_symmetric=True, is_positive_semidefinite=True)
        self.damping = damping
        self._blocks = [(block, *spectra[block.positions]) for block in blocks if block.positions in spectra]

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        found: dict[int, Tensor] = {}
        for (block, left, right), weights in zip(self._blocks, self._weights, strict=True):
            found.update(block.apart(_solved(left, right, *weights, block.side_by_side(v)), v))
        return [found[i] if i in found else x / self.damping for i, x in enumerate(v)]

    @cached_property
    def _weights(self) -> list[tuple[Weights, Weights | None]]:
        """For each block those of (rL + λI)⁻¹ for the eigenvalues r in the basis of R, and for the others."""

        def weight_for(r: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda e: 1 / (e * r.unsqueeze(1) + self.damping)

        def of(left: Eigenpairs, right: Eigenpairs) -> tuple[Weights, Weights | None]:
            of_values = weight_for(right.values)
            if right.tail is None:
                return left.weights(of_values), None
            of_tail = weight_for(right.tail)
            return left.weights(lambda e: of_values(e) - of_tail(e)), left.weights(of_tail)

        return [of(left, right) for _, left, right in self._blocks]

    def costs(self, num_products: int = 1) -> Costs:
        """Products by eigenpairs."""
        product = 0.0
        for block, left, right in self._blocks:
            entries = 2.0 * block.left.shape[:2].numel() * block.right.shape[1]
            product += 2 * entries * sum(s.values.shape[1] for s in (left, right) if s.basis is not None)
        return Costs(product=product, dense=product * self.shape[1])


def _solved(left: Eigenpairs, right: Eigenpairs, inner: Weights, outer: Weights | None, V: Tensor) -> Tensor:
    """Σ (rL + λI)⁻¹ V wwᵀ."""
    if right.basis is None:
        return left.filtered(V, inner)
    span = left.filtered(V @ right.basis, inner)
    return span @ right.basis.mT if outer is None else left.filtered(V, outer).baddbmm_(span, right.basis.mT)
