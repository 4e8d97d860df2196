"""The two ways in which `Newton` without arguments makes a step, and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import torch

from torchnewton.curvature import DifferenceJacobian, GaussNewton, LinearOperator
from torchnewton.distributed import Alone
from torchnewton.globalization import AutoDamping, Damping, LevenbergMarquardt, Unit
from torchnewton.optim.acceleration import GeodesicAcceleration
from torchnewton.optim.bold import Bold
from torchnewton.optim.glide import Glide
from torchnewton.record import StreamedTape, Tape
from torchnewton.solvers import Auto, Plane, Solver
from torchnewton.vectors import is_distributed

CALLS = 1e8  # operations that take as long as what surrounds them in a step of a small network


@dataclass(frozen=True)
class Regime:
    """What a step is composed of, in the words of `Newton`."""

    curvature: Callable[[Tape], LinearOperator]
    solver: Solver
    damping: Damping
    acceleration: GeodesicAcceleration | None
    preconditioned: bool


def _for_plane(tape: Tape) -> GaussNewton:
    """By differences, whose error √ε moves no step; in float64, where digits are asked for, exactly.

    Differences would let the order of the samples, and the processes that have them, move a step by 1e-9.
    """
    exact = all(p.dtype is torch.float64 for p in tape.params)
    return GaussNewton(tape) if exact else GaussNewton(tape, DifferenceJacobian(tape))


# One batch says enough: its Gauss-Newton matrix, factorized.
EXACT = Regime(GaussNewton, Auto(expected_iterations=1000), AutoDamping(), GeodesicAcceleration(), preconditioned=False)

# It does not: Kronecker factors of many, and the batch's own matrix in the plane of their direction and the last step.
PLANE = Regime(
    _for_plane,
    Plane(),
    LevenbergMarquardt(initial=1.0, decrease=0.5, minimum=1e-3, unit=Unit.NOISE),
    acceleration=None,
    preconditioned=True,
)


@dataclass(frozen=True)
class RegimeState:
    """What is remembered between steps; replaced, never changed.

    `exact` says which regime the last step was made in, None before the first; `price` how many steps in `PLANE` an
    exact one costs, infinite where it cannot be had or afforded; `fixed` whether it can on the same data, where it may
    cost more, None before that was asked. `evidence` is what the new ratios say for exact steps,
    `trial` counts the steps of a trial that are left, `next_trial` is the number of the step at which one begins.
    `other` are λ and its unit in the regime not in use.
    """

    exact: bool | None = None
    price: float = math.inf
    fixed: bool | None = None
    evidence: float = 0.0
    trial: int = 0
    next_trial: int = 0
    other: tuple[float, float | None] | None = None

    @property
    def cheap(self) -> bool:
        """Whether exact steps can be afforded."""
        return math.isfinite(self.price)


@dataclass(frozen=True)
class RegimeChoice:
    """`EXACT` where a factorization is cheap and its steps help on other data, else `PLANE`.

    A factorization is cheap where `Auto` finds one of at most `gradients` gradients or `flops` operations. A step on
    the same data as the last is `EXACT`, at up to `patience` times that cost where the closure takes derivatives: the
    gradient of a physics-informed network costs more than is counted, and Kronecker factors know nothing of derivatives
    by the points. The first is made in `PLANE`, since nothing is known of its data.

    Where a step comes with other data, the last one is judged on them: its new ratio r is the reduction there over
    the reduction predicted. An exact step fits its batch, noise included, and with noise that is no progress: new
    ratios scatter around 0, without noise around ½. So on changing data, after `first_trial` steps and each time
    after `growth` times as many, `EXACT` is on trial for `trial` steps. The evidence S starts at 0 and becomes
    min(S + r − `expected`, 1), r counted as at least −0.1 and at most 1: a step that overshoots says no more than one
    that does not help. Below −`doubt` the trial has failed, and the parameters return to where it began if the loss
    of the new data is lower there. Who passes stays under the same watch, with half of `expected`. (A sequential test
    after Page, Biometrika 41, 1954: noise ends a trial in two to five steps.)

    `glide` makes the cheaper steps between full ones in `PLANE`; None for full steps alone. `bold` tries exact steps
    that no new ratio ends; None for no such steps.

    Always `EXACT` where no Kronecker factors can be made: on a streamed objective (`tn.over`), which keeps no graph,
    and for DTensors. Over several ranks the costs are those of the slowest and of the exchanges, and the Gram matrix is
    not to be had.
    """

    gradients: float = 20.0
    flops: float = 6e9
    patience: float = 50.0
    first_trial: int = 40
    growth: int = 20
    trial: int = 20
    expected: float = 0.15
    doubt: float = 0.4
    glide: Glide | None = field(default_factory=Glide)
    bold: Bold | None = field(default_factory=Bold)

    def price(self, tape: Tape | StreamedTape, share: Alone, patience: float = 1.0) -> float:
        """How many steps in `PLANE` one in `EXACT` costs, infinite if too many; the same on all ranks."""
        if not self.allows_plane(tape):
            return 0.0
        A = share.operator(GaussNewton(tape))
        options = Auto().options(A, tape.params)
        cheapest = min((flops for name, (flops, _) in options.items() if name != "CG"), default=math.inf)
        gradient = share.largest(3 * tape.forward_flops)
        affordable = cheapest <= patience * max(self.flops, self.gradients * gradient) and A.can_factor()
        return (cheapest + CALLS) / (gradient + CALLS) if affordable else math.inf

    def asked_for_same_data(self, state: RegimeState, tape: Tape | StreamedTape, share: Alone) -> RegimeState:
        """With the answer whether exact steps can be had on the same data."""
        if state.exact or state.fixed is not None:
            return state
        patient = isinstance(tape, Tape) and tape.differentiates
        return replace(state, fixed=state.cheap or (patient and math.isfinite(self.price(tape, share, self.patience))))

    def allows_plane(self, tape: Tape | StreamedTape) -> TypeGuard[Tape]:
        """Whether Kronecker factors can be made of this tape."""
        return isinstance(tape, Tape) and not any(is_distributed(p) for p in tape.params)

    def first(self, tape: Tape | StreamedTape, share: Alone) -> RegimeState:
        """For the first step."""
        price = self.price(tape, share)
        return RegimeState(exact=not self.allows_plane(tape), price=price, next_trial=self.first_trial)

    def judged(self, state: RegimeState, new_ratio: float) -> RegimeState:
        """With one more new ratio; one that is not a number says nothing."""
        if math.isnan(new_ratio):
            return state
        expected = self.expected if state.trial > 0 else self.expected / 2
        return replace(state, evidence=min(state.evidence + min(max(new_ratio, -0.1), 1.0) - expected, 1.0))

    def next(self, state: RegimeState, step: int, same_data: bool) -> tuple[RegimeState, bool]:
        """The state for step number `step`, and whether a trial has failed."""
        if not state.exact:
            if state.fixed and same_data:
                return replace(state, exact=True, evidence=0.0), False
            if not state.cheap or step < state.next_trial:
                return state, False
            later = self.growth * state.next_trial
            return replace(state, exact=True, evidence=0.0, trial=self.trial, next_trial=later), False
        ends = state.evidence < -self.doubt
        failed = ends and state.trial > 0
        return replace(state, exact=not ends, trial=0 if ends else max(state.trial - 1, 0)), failed
