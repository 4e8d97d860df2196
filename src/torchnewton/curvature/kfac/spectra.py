"""(L ⊗ R + λI)⁻¹ for every λ, from the leading eigenpairs of L and R."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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

    def filtered(self, V: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
        """w(this matrix) · V for V g × n × m and a function `weight` of eigenvalues g × k × 1, for every column."""
        weights = weight(self.values.unsqueeze(2))
        if self.basis is None:
            return weights * V
        span = self.basis.mT @ V
        if self.tail is None:
            return self.basis @ span.mul_(weights)
        rest = weight(self.tail.unsqueeze(2))
        return (rest * V).baddbmm_(self.basis, span.mul_(weights - rest))


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
        for block, left, right in self._blocks:
            found.update(block.apart(self._solved(left, right, block.side_by_side(v)), v))
        return [found[i] if i in found else x / self.damping for i, x in enumerate(v)]

    def _solved(self, left: Eigenpairs, right: Eigenpairs, V: Tensor) -> Tensor:
        def weight_for(r: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda e: 1 / (e * r.unsqueeze(1) + self.damping)

        of_values = weight_for(right.values)
        if right.basis is None:
            return left.filtered(V, of_values)
        span = V @ right.basis
        if right.tail is None:
            return left.filtered(span, of_values) @ right.basis.mT
        of_tail = weight_for(right.tail)
        inner = left.filtered(span, lambda e: of_values(e) - of_tail(e))
        return left.filtered(V, of_tail).baddbmm_(inner, right.basis.mT)

    def costs(self, num_products: int = 1) -> Costs:
        """Products by eigenpairs."""
        product = 0.0
        for block, left, right in self._blocks:
            entries = 2.0 * block.left.shape[:2].numel() * block.right.shape[1]
            product += 2 * entries * sum(s.values.shape[1] for s in (left, right) if s.basis is not None)
        return Costs(product=product, dense=product * self.shape[1])
