"""One derivative along one direction, by three ways that know nothing of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature.complex_step.operator import ComplexStepHessian
from torchnewton.curvature.complex_step.real import recorded
from torchnewton.curvature.hessian import Hessian
from torchnewton.record import Closure, Tape
from torchnewton.vectors import Vector


class Backend(Protocol):
    """A way to differentiate."""

    def slope(self, closure: Closure, params: Sequence[Tensor], v: Vector) -> float:
        """gᵀv."""
        ...

    def product(self, closure: Closure, params: Sequence[Tensor], v: Vector) -> Vector:
        """Hv."""
        ...


@dataclass(frozen=True)
class ComplexStep:
    """gᵀv = Im f(θ + ihv)/h and Hv = Im ∇f(θ + ihv)/h: see `ComplexStepHessian`. Exact to rounding for h ≤ 1e-8."""

    h: float = 1e-20

    def slope(self, closure: Closure, params: Sequence[Tensor], v: Vector) -> float:
        """gᵀv."""
        return ComplexStepHessian(closure, params, self.h).slope(v)

    def product(self, closure: Closure, params: Sequence[Tensor], v: Vector) -> Vector:
        """Hv."""
        return ComplexStepHessian(closure, params, self.h) @ v


@dataclass(frozen=True)
class Autodiff:
    """gᵀv by one, Hv by two reverse passes. Exact to rounding."""

    def slope(self, closure: Closure, params: Sequence[Tensor], v: Vector) -> float:
        """gᵀv."""
        return vectors.dot(recorded(closure, params).gradient, v)

    def product(self, closure: Closure, params: Sequence[Tensor], v: Vector) -> Vector:
        """Hv."""
        return Hessian(recorded(closure, params)) @ v


@dataclass(frozen=True)
class FiniteDifference:
    """gᵀv by the central difference of f, Hv by that of ∇f, at θ ± hv/max|v|.

    The error is of order h² from the series and ε/h from the rounding; the default h = ε^⅓ · max(1, max|θ|) leaves
    about ε^⅔. The parameters hold other data during the call.
    """

    h: float | None = None

    def slope(self, closure: Closure, params: Sequence[Tensor], v: Vector) -> float:
        """(f(θ + tv) − f(θ − tv))/2t."""
        t = self._length(params, v)
        ends = [float(tape.loss.double()) for tape in self._ends(closure, params, v, t)]
        return (ends[0] - ends[1]) / (2 * t)

    def product(self, closure: Closure, params: Sequence[Tensor], v: Vector) -> Vector:
        """(∇f(θ + tv) − ∇f(θ − tv))/2t."""
        t = self._length(params, v)
        ends = [tape.gradient for tape in self._ends(closure, params, v, t)]
        return vectors.scale(vectors.add(ends[0], ends[1], -1.0), 1 / (2 * t))

    def _length(self, params: Sequence[Tensor], v: Vector) -> float:
        h = self.h
        if h is None:
            eps = max(torch.finfo(p.dtype).eps for p in params)
            h = eps ** (1 / 3) * max(1.0, vectors.max_abs([p.detach() for p in params]))
        return float(h / vectors.max_abs(v))

    def _ends(self, closure: Closure, params: Sequence[Tensor], v: Vector, t: float) -> list[Tape]:
        values = vectors.clone(params)
        return [recorded(closure, params, vectors.add(values, v, sign * t)) for sign in (1, -1)]


_DEFAULT = ComplexStep()


def directional_derivative(
    closure: Closure,
    params: Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    backend: Backend = _DEFAULT,
    order: int = 1,
) -> float:
    """gᵀv for `order=1`, vᵀHv for `order=2`: what f does along v, by a backend of choice.

    `v` is one flat tensor or a list like the parameters; frozen parameters do not move. Nothing is left changed: the
    closure sees the same random numbers in every call, buffers and gradients are put back.

        exact = tn.directional_derivative(closure, params, v, tn.ComplexStep())
        check = tn.directional_derivative(closure, params, v, tn.FiniteDifference())

    Cost: a gradient, and a run on complex numbers (complex step) or a product (order 2); differences two gradients.

    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> f = lambda: theta[0] ** 2 * theta[1]
    >>> [directional_derivative(f, [theta], torch.tensor([1.0, 0.0]), order=k) for k in (1, 2)]  # 2 θ₁θ₂, 2 θ₂
    [4.0, 4.0]
    """
    params = list(params)
    if order not in (1, 2):
        raise ValueError(f"order is {order}: it has to be 1 (gᵀv) or 2 (vᵀHv).")
    direction = vectors.unflatten(v, params) if isinstance(v, Tensor) else list(v)
    if [x.shape for x in direction] != [p.shape for p in params]:
        raise ValueError(
            "v has other shapes than the parameters: give a list of tensors like them, or one flat tensor."
        )
    direction = [x if p.requires_grad else torch.zeros_like(x) for x, p in zip(direction, params, strict=True)]
    if vectors.max_abs(direction) == 0:
        return 0.0
    if order == 1:
        return backend.slope(closure, params, direction)
    return vectors.dot(direction, backend.product(closure, params, direction))
