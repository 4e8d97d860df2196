"""The empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from torchnewton.costs import Costs
from torchnewton.curvature.cost_model import CALL
from torchnewton.curvature.dense import require_agreement
from torchnewton.curvature.factor import StoredRows
from torchnewton.curvature.gauss_newton import GaussNewton
from torchnewton.curvature.jacobian import Jacobian
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import NotPerSampleError, PerSample, Piece, Tape
from torchnewton.vectors import Vector, flatten, symmetric_product, unflatten

Reduction = Literal["mean", "sum"]

_MOST_ROW_ENTRIES = 10**8  # numbers that a diagonal may hold on the way
_OVER_CLASSES = {"cross_entropy", "nll_loss", "kl_div"}  # their outputs of one dimension are the classes of one sample


@dataclass(frozen=True)
class _Scores:
    """The loss gradients of the samples of one piece, in each of its outputs, which have `positions` on the tape."""

    positions: list[int]
    parts: list[Tensor]
    num_samples: int
    sign: float


class EmpiricalFisher(LinearOperator):
    """F = Σₙ wₙ ∇ℓₙ ∇ℓₙᵀ for a loss f = Σₙ wₙ ℓₙ: outer products of the gradients of the samples.

    Conventions. A sample is an index of the first dimension of the outputs z; ℓₙ is the sum of the entries that its
    loss call has with reduction="none", and wₙ = ∂f/∂ℓₙ. So for N samples and a weight w in front of the loss:

        reduction="sum"              F = w Σₙ ∇ℓₙ∇ℓₙᵀ
        reduction="mean"             F = w/D Σₙ ∇ℓₙ∇ℓₙᵀ with D what torch divides by: N for a cross entropy (less the
                                     ignored samples; the sum of the class weights where there are some), the number
                                     of entries N·C for mse_loss and binary cross entropies, as in curvlinops
        reduction="none", weights    F = Σₙ sₙsₙᵀ with sₙ = Σᵢ √wᵢ ∇ℓᵢ over the entries i of the sample; for weights
                                     that do not differ within a sample this is Σₙ wₙ∇ℓₙ∇ℓₙᵀ

    F scales as f does, and is the Gauss-Newton matrix on average over labels drawn from the model, when ℓₙ is a
    negative log-likelihood. A loss with marked outputs (`tn.outputs`) does not tell how it is reduced: state it by
    `reduction`. Several losses add up, without products between gradients of different losses. Where samples are
    mixed (BatchNorm) the gradient of sample n is Jᵀ(∂f/∂zₙ). Part of the loss beside the outputs has no samples and
    does not count.

    Products go by `jacobian`, which without one is chosen as for `GaussNewton`.

    Shapes: P×P with P parameters. Cost: as `GaussNewton`. Memory: one more tensor like each output.
    Errors: `RecordError` when the loss has no split; `ValueError` for weights of both signs within one loss, and
    without `reduction` for marked outputs and losses written by hand.
    Source: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation", 2019, equation 3.

    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> tape = record(lambda: torch.nn.functional.mse_loss(x @ theta, torch.zeros(2), reduction="sum"), [theta])
    >>> EmpiricalFisher(tape).to_dense()  # Σ (2 zₙ xₙ)(2 zₙ xₙ)ᵀ, z = (1, 3)
    tensor([[40., 36.],
            [36., 36.]], dtype=torch.float64)
    """

    def __init__(self, tape: Tape, jacobian: Jacobian | None = None, *, reduction: Reduction | None = None) -> None:
        if reduction not in ("mean", "sum", None):
            raise ValueError(f'EmpiricalFisher: reduction={reduction!r} must be "mean" or "sum".')
        self.tape = tape
        self._gauss_newton = GaussNewton(tape, jacobian)  # chooses the Jacobian
        self._scores = _scores(tape, reduction)
        positive = all(s.sign > 0 for s in self._scores)
        super().__init__(tape.params, tape.params, is_symmetric=True, is_positive_semidefinite=positive)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """Σₙ sₙ⟨sₙ, v⟩ = Jᵀ(r ⟨r, Jv⟩), the inner product taken per sample."""
        y = self._gauss_newton.jacobian.apply(v)
        cotangents = [torch.zeros_like(z) for z in self.tape.outputs]
        for s in self._scores:
            each = [_per_sample(y[i] * r, s.num_samples).sum(1) for i, r in zip(s.positions, s.parts, strict=True)]
            products = torch.stack(each).sum(0)
            for i, r in zip(s.positions, s.parts, strict=True):
                cotangents[i] += _weighted(r, s.sign * products)
        return self._gauss_newton.jacobian.adjoint(cotangents)

    @property
    def _num_rows(self) -> int:
        return sum(s.num_samples for s in self._scores)

    @cached_property
    def _rows_of_samples(self) -> list[Tensor] | None:
        """The gradients sₙ of every piece by per-sample copies of the parameters; None where that is not possible."""
        try:
            outputs, replay = self.tape.per_sample()
            return [self._rows_by_copies(s, outputs, replay) for s in self._scores]
        except NotPerSampleError:
            return None

    def _rows_by_copies(self, s: _Scores, outputs: Sequence[Tensor], replay: PerSample) -> Tensor:
        params = self.tape.params
        with torch.enable_grad():
            total = torch.stack([(outputs[i] * r).sum() for i, r in zip(s.positions, s.parts, strict=True)]).sum()
        rows = params[0].new_zeros(s.num_samples, self.shape[0])
        parts = rows.split([p.numel() for p in params], dim=1)
        if total.requires_grad:
            for position, part in replay.rows(total, s.num_samples):
                parts[position].add_(part)
        generator = torch.Generator(device=rows.device).manual_seed(0)
        weights = torch.randn(s.num_samples, generator=generator, dtype=rows.dtype, device=rows.device)
        require_agreement(weights @ rows, lambda r: flatten(self._gradient(s, r)), weights, params)
        return rows

    def _gradient(self, s: _Scores, weights: Tensor) -> Vector:
        """Σₙ weightsₙ sₙ."""
        cotangents = [torch.zeros_like(z) for z in self.tape.outputs]
        for i, r in zip(s.positions, s.parts, strict=True):
            cotangents[i] += _weighted(r, weights)
        return self._gauss_newton.jacobian.adjoint(cotangents)

    @cached_property
    def _rows(self) -> list[Tensor]:
        if self._rows_of_samples is not None:
            return self._rows_of_samples
        like = self.tape.params[0]
        rows = []
        for s in self._scores:
            unit = torch.eye(s.num_samples, dtype=like.dtype, device=like.device)
            rows.append(torch.stack([flatten(self._gradient(s, e)) for e in unit]))
        return rows

    def factored(self) -> tuple[StoredRows, float] | None:
        """R with F = RᵀR, its rows the gradients sₙ; None where they cannot be had at once or a loss is subtracted."""
        if not self.is_positive_semidefinite or self._rows_of_samples is None:
            return None
        return StoredRows(torch.cat(self._rows_of_samples), self.domain), 0.0

    def to_dense(self) -> Tensor:
        """The matrix in float64, from the gradients of the samples, which are kept.

        Where the closure treats samples independently they come from one more forward and one backward pass for each
        loss; otherwise each takes its own backward pass. Memory: N·P numbers and the matrix.
        """
        signed = torch.cat([s.sign * rows for s, rows in zip(self._scores, self._rows, strict=True)])
        return symmetric_product(torch.cat(self._rows), signed, torch.float64)

    def _exact_diagonal(self) -> Vector | None:
        if self._num_rows * self.shape[1] > _MOST_ROW_ENTRIES or self._rows_of_samples is None:
            return None
        squares = [s.sign * rows.square().sum(0) for s, rows in zip(self._scores, self._rows_of_samples, strict=True)]
        flat = torch.stack(squares).sum(0)
        return unflatten(flat, self.domain)

    def costs(self, num_products: int = 1) -> Costs:
        """Products cost as much as for `GaussNewton`; rows a forward pass and a backward pass for each loss."""
        products, size = self._gauss_newton.costs(num_products), float(self.shape[1])
        forward = self.tape.forward_flops + CALL * len(self.tape.layer_calls)
        rows = (2 + 4 * len(self._scores)) * forward
        n = self._num_rows
        return Costs(products.product, products.setup, rows + n * size**2, rows + n**2 * size, n)

    def expect(self, num_products: int) -> None:
        """See `GaussNewton.expect`."""
        self._gauss_newton.expect(num_products)

    def can_factor(self) -> bool:
        """Whether the gradients of the samples are to be had at once."""
        return self._rows_of_samples is not None

    @property
    def gradients_per_product(self) -> float:
        """Those of the Jacobian."""
        return self._gauss_newton.jacobian.gradients_per_product

    @property
    def path(self) -> str:
        """How products are made."""
        return self._gauss_newton.jacobian.path


def _scores(tape: Tape, reduction: Reduction | None) -> list[_Scores]:
    found = []
    start = 0
    for term in tape.terms:
        position = {edge: start + i for i, edge in enumerate(term.edges)}
        start += len(term.edges)
        for piece in term.pieces:
            weight, sign = _signed(piece)
            n = _num_samples(piece)
            parts = piece.slope_for((weight * _divisor(piece, n, reduction)).sqrt())
            found.append(_Scores([position[edge] for edge in piece.edges], parts, n, sign))
    return found


def _signed(piece: Piece) -> tuple[Tensor, float]:
    if bool((piece.weight >= 0).all()):
        return piece.weight, 1.0
    if bool((piece.weight <= 0).all()):
        return -piece.weight, -1.0
    raise ValueError(
        f"EmpiricalFisher: the entries of a {piece.name} have weights of both signs in the loss; call it once for "
        "those that are added and once for those that are subtracted."
    )


def _num_samples(piece: Piece) -> int:
    classes = piece.name in _OVER_CLASSES
    sizes = {1 if z.dim() == 0 or (classes and z.dim() == 1) else z.shape[0] for z in piece.outputs}
    if len(sizes) > 1:
        raise ValueError(f"EmpiricalFisher: the outputs of a {piece.name} have different numbers of samples: {sizes}.")
    return sizes.pop()


def _divisor(piece: Piece, num_samples: int, reduction: Reduction | None) -> float:
    if piece.divisor is not None:
        return piece.divisor()
    if reduction is None:
        raise ValueError(
            "EmpiricalFisher: a loss of marked outputs or one written by hand does not tell how it combines samples; "
            'say reduction="mean" or reduction="sum".'
        )
    return float(num_samples) if reduction == "mean" else 1.0


def _per_sample(x: Tensor, num_samples: int) -> Tensor:
    return x.reshape(num_samples, x.numel() // max(num_samples, 1))


def _weighted(r: Tensor, weights: Tensor) -> Tensor:
    """r with sample n multiplied by weights[n]."""
    return (_per_sample(r, len(weights)) * weights.to(r.dtype)[:, None]).view(r.shape)
