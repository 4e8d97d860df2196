"""How well two halves of a batch agree on the curvature along a direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import RecordError, Tape, moved
from torchnewton.vectors import Vector


class Halves(LinearOperator):
    """An operator of a tape's loss that also knows what each sample adds to a curvature.

    With ż and z̈ the first two derivatives of the outputs z along p, pᵀHp = Σᵢ qᵢ over the rows i of z,

        qᵢ = żᵢᵀBᵢżᵢ + (∂f/∂zᵢ)ᵀz̈ᵢ,        disagreement(p)² = n/(n−1) Σᵢ (qᵢ − q̄)² / (pᵀHp)²

    which is the mean of |q₁ − q₂|² / |q₁ + q₂|² over all ways to cut the n rows into halves of curvature q₁ and q₂.
    Products are those of `base`. ż and z̈ are central differences over a distance that changes f by about ε^⅓ of itself.

    A row is an entry of the first dimension of an output; outputs with as many rows are taken to be of the same
    samples. There is no answer (None) where the loss has no split, reaches the parameters beside it, or where no
    output has two rows.

    Cost: two forward passes a direction, beside its product. Memory: two copies of the outputs.

    >>> theta, x = torch.tensor([0.0], requires_grad=True), torch.tensor([[1.0], [3.0]])
    >>> tape = record(lambda: torch.nn.functional.mse_loss(x * theta, x), [theta])
    >>> A = Halves(Hessian(tape), tape)  # q = (1, 9): |q₁ − q₂| is 8 of 10
    >>> round(A.disagreement([torch.tensor([1.0])], 10.0), 3)
    0.8
    """

    def __init__(self, base: LinearOperator, tape: Tape) -> None:
        super().__init__(
            base.domain,
            base.codomain,
            is_symmetric=base.is_symmetric,
            is_positive_semidefinite=base.is_positive_semidefinite,
            parts=[base],
        )
        self.base, self.tape = base, tape
        self._splits = all(term.outputs for term in tape.terms) and not tape.has_rest

    @classmethod
    def of(cls, curvature: Callable[[Tape], LinearOperator]) -> Callable[[Tape], Halves]:
        """The same for a curvature that is made from a tape."""
        return partial(_halves, cls, curvature)  # which can be pickled

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """Av."""
        return self.base.apply(v)

    def factored(self) -> tuple[Any, float] | None:
        """That of A."""
        return self.base.factored()

    def to_dense(self) -> Tensor:
        """That of A."""
        return self.base.to_dense()

    def disagreement(self, p: Sequence[Tensor], curvature: float) -> float | None:
        """The root mean square of |q₁ − q₂| over all halves, relative to `curvature` = pᵀAp > 0; see the class."""
        distance = self._distance(p, curvature) if self._splits and curvature > 0 else 0.0
        if not (math.isfinite(distance) and distance > 0):
            return None
        rows = self._rows(p, distance)
        counted = {n: q for n, q in rows.items() if n > 1}
        if not counted or not vectors.is_finite(list(rows.values())):
            return None
        variance = sum(float((q - q.mean()).square().sum()) * n / (n - 1) for n, q in counted.items())
        return math.sqrt(variance) / curvature

    def _distance(self, p: Sequence[Tensor], curvature: float) -> float:
        """h with ½h²pᵀAp = ε^⅓|f|, and h‖p‖ at most a hundredth of 1 + ‖θ‖."""
        length, size = vectors.norm(p), vectors.norm([x.detach() for x in self.domain])
        eps = torch.finfo(p[0].dtype).eps
        return min(math.sqrt(2 * eps ** (1 / 3) * abs(float(self.tape.loss)) / curvature), 0.01 * (1 + size) / length)

    def _rows(self, p: Sequence[Tensor], h: float) -> dict[int, Tensor]:
        """q in float64, by the number of rows."""
        try:
            ahead, behind = self._outputs(p, h), self._outputs(p, -h)
        except RecordError:  # the closure takes another course there
            return {}
        rows: dict[int, Tensor] = {}
        for number, term in enumerate(self.tape.terms):
            ends = zip(self.tape.of_term(ahead, number), self.tape.of_term(behind, number), term.outputs, strict=True)
            pairs = [((a - b) / (2 * h), (a - 2 * z.detach() + b) / h**2) for a, b, z in ends]
            curved = term.hessian_product([first for first, _ in pairs])
            for (first, second), Bz, slope in zip(pairs, curved, term.cotangents, strict=True):
                q = (first * Bz + second * slope.detach()).double()
                q = q.reshape(len(q), -1).sum(1) if q.dim() else q.reshape(1)
                rows[len(q)] = rows[len(q)] + q if len(q) in rows else q
        return rows

    def _outputs(self, p: Sequence[Tensor], h: float) -> list[Tensor]:
        with moved(self.tape.params, p, h):
            return self.tape.evaluate_outputs()


def _halves(kind: type[Halves], curvature: Callable[[Tape], LinearOperator], tape: Tape) -> Halves:
    return kind(curvature(tape), tape)
