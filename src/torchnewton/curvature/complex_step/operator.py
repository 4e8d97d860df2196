"""The Hessian by the complex step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.costs import Costs
from torchnewton.curvature.complex_step.real import recorded
from torchnewton.curvature.complex_step.run import WAY_OUT, Outcome, run_closure
from torchnewton.curvature.cost_model import CALL
from torchnewton.curvature.operator import LinearOperator
from torchnewton.record import Closure, RecordError, Tape
from torchnewton.vectors import Vector

SMALLEST_OF_FLOAT32 = 1e-31
SMALL = 1e-8  # up to here h² is below the rounding of float64


class ComplexStepHessian(LinearOperator):
    """H = ∇²f by Hv = Im ∇f(θ + ihv)/h: a derivative without a difference, so that h may be as small as 1e-100.

    One run of the unchanged closure on complex numbers (pairs of real tensors) and one backward pass; gᵀv = Im f/h
    comes with it and is `directional_derivative` after each product. Every operation is continued analytically by a
    rule and branches on the real part: see docs/complex_step.md for the table and `complex_step_rule` for one's own.

    θ, the `params`, is copied; the gradient is that of `tape`, or of one that is recorded. h counts in units of
    max|v|, both rounded to powers of two, which costs no digits. Up to h = 1e-8 products of two imaginary parts, h²
    below the rest, are left out; above they count and the error is of order h². Every product sees the buffers and
    the random numbers of the construction; nothing of it is left changed.

    Shapes: P×P with P parameters; `A @ v` takes and gives a vector like the parameters; symmetric, mostly indefinite.
    Cost: a product 8/3 of a gradient by the count of matrix products; construction a gradient and a forward pass.
    Memory: about twice that of a gradient, and θ.
    Errors: `RecordError` for an operation without a rule, which names it; and whenever gᵀv is not that of the real
    gradient, since then some derivative went around the rules. `ValueError` for h.
    Source: Shen et al., "Second-order Neural Network Training Using Complex-step Directional Derivative", arXiv
    2009.07098; Martins, Sturdza, Alonso, "The Complex-Step Derivative Approximation", 2003.

    >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> H = ComplexStepHessian(lambda: theta[0] ** 2 * theta[1], [theta])
    >>> H.to_dense()  # [[2 θ₂, 2 θ₁], [2 θ₁, 0]]
    tensor([[4., 2.],
            [2., 0.]])
    """

    def __init__(
        self, closure: Closure, params: Sequence[Tensor], h: float = 1e-20, *, tape: Tape | None = None
    ) -> None:
        if not 0 < h < 1:
            raise ValueError(f"h is {h}: it has to lie between 0 and 1, and 1e-20 is right for every purpose.")
        params = list(params)
        super().__init__(params, params, is_symmetric=True)
        smallest = min(torch.finfo(p.dtype).tiny for p in params)
        if h < smallest / torch.finfo(params[0].dtype).eps:
            raise ValueError(f"h is {h}: too small for {params[0].dtype}, which needs {smallest:.0e} with a margin.")
        self.closure = closure
        self.params = params
        self.h = 2.0 ** round(math.log2(h))
        self.directional_derivative = math.nan
        self.loss = math.nan
        if tape is None:
            tape = recorded(closure, params)
        self.gradient = [g.detach().clone() for g in tape.gradient]
        self._values = [p.detach().clone() for p in params]
        self._random_state, self._buffers = tape.random_state, tape.buffers
        self._flops, self._calls = tape.forward_flops, 12 * CALL * len(tape.layer_calls)
        self._check_itself()

    @classmethod
    def of(cls, tape: Tape, h: float = 1e-20) -> ComplexStepHessian:
        """The Hessian at a recorded point: its random numbers are those of the tape, its gradient is the check's."""
        return cls(tape.closure, tape.params, h, tape=tape)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """Im ∇f(θ + ihv)/h."""
        size = _size(v)
        if size == 0:
            self.directional_derivative = 0.0
            return vectors.zeros_like(self.params)
        outcome = self._run(vectors.scale(v, 1 / size))
        self._compare(outcome, v, size)
        self.directional_derivative = outcome.imaginary / self.h * size
        assert outcome.product is not None
        return [y / self.h * size for y in outcome.product]

    def slope(self, v: Sequence[Tensor]) -> float:
        """gᵀv = Im f(θ + ihv)/h alone: no backward pass."""
        size = _size(v)
        if size == 0:
            return 0.0
        outcome = self._run(vectors.scale(v, 1 / size), differentiate=False)
        self._compare(outcome, v, size)
        return outcome.imaginary / self.h * size

    @property
    def covers_whole_loss(self) -> bool:
        """True."""
        return True

    @property
    def gradients_per_product(self) -> float:
        """8/3: eight matrix products a layer, a gradient has three."""
        return 8 / 3

    def costs(self, num_products: int = 1) -> Costs:
        """Product: eight matrix products a layer where a gradient has three. Dense: one product a column."""
        product = 8 * self._flops + self._calls
        return Costs(product=product, dense=product * self.shape[1])

    def _run(self, v: Sequence[Tensor], differentiate: bool = True) -> Outcome:
        """One run at θ + ihv for max|v| = 1."""
        outcome = run_closure(
            self.closure,
            self.params,
            self._values,
            vectors.scale(v, self.h),
            random_state=self._random_state,
            buffers=self._buffers,
            keeps_squares=self.h > SMALL,
            differentiate=differentiate,
        )
        self.loss = outcome.value
        return outcome

    def _compare(self, outcome: Outcome, v: Sequence[Tensor], size: float) -> None:
        """Refuse a gᵀv that is not that of the real gradient: to ε^0.4, or to h² where squares count."""
        expected = vectors.dot(self.gradient, v) / size
        found = outcome.imaginary / self.h
        if not math.isfinite(expected):
            return
        length = vectors.norm(v) / size
        rounding = 10 * outcome.eps * (1 + abs(float(self.loss))) * length  # of a gradient that all but vanishes
        tolerance = (outcome.eps**0.4 + 100 * self.h**2) * vectors.norm(self.gradient) * length + rounding
        if not abs(found - expected) <= tolerance:
            small = self.h < SMALLEST_OF_FLOAT32 and outcome.eps > 1e-10
            hint = f"h = {self.h:.0e} underflows in a part of low precision: take h=1e-20; or " if small else ""
            raise RecordError(
                f"the complex step gives the slope {found:.6g} along a direction where the gradient gives "
                f"{expected:.6g}: {hint}{WAY_OUT}"
            )

    def _check_itself(self) -> None:
        """A random direction; rules of the user's own are also checked by a difference of gradients."""
        generator = torch.Generator().manual_seed(0)
        v = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in self.params]
        unit = vectors.scale(v, 1 / _size(v))
        outcome = self._run(unit, differentiate=False)
        self._compare(outcome, unit, 1.0)
        if outcome.used:
            self._check_rules(unit, outcome)

    def _check_rules(self, v: Sequence[Tensor], outcome: Outcome) -> None:
        """Hv against the central difference of real gradients: what a rule that autograd cannot follow fails."""
        step = outcome.eps ** (1 / 3)
        places = [vectors.add(self._values, v, sign * step) for sign in (1, -1)]
        ends = [recorded(self.closure, self.params, x, self._random_state, self._buffers).gradient for x in places]
        expected = [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]
        product = self._run(v).product
        assert product is not None
        difference = vectors.norm(vectors.add(expected, product, -1 / self.h))
        if not difference <= 10 * outcome.eps**0.25 * (vectors.norm(expected) + vectors.norm(self.gradient)):
            names = ", ".join(sorted(getattr(f, "__name__", str(f)) for f in outcome.used))
            raise RecordError(
                f"a product differs from the difference of gradients by {difference:.3g} of "
                f"{vectors.norm(expected):.3g}: the rule of {names} is wrong or cannot be differentiated. Make its "
                "imaginary part, f′(z.re) * z.im, of operations that autograd can differentiate; detach nothing."
            )


def _size(v: Sequence[Tensor]) -> float:
    """max|v| rounded to a power of two; 0 for a zero vector."""
    size = vectors.max_abs(v)
    if not math.isfinite(size):
        raise ValueError("A @ v: v has entries that are not finite.")
    return 2.0 ** round(math.log2(size)) if size else 0.0
