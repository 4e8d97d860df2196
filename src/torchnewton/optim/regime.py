"""The two ways in which `Newton` without arguments makes a step, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import torch

from torchnewton.curvature import DifferenceJacobian, GaussNewton, LinearOperator
from torchnewton.distributed import Alone
from torchnewton.globalization import AutoDamping, Damping, LevenbergMarquardt, Unit
from torchnewton.optim.acceleration import GeodesicAcceleration
from torchnewton.optim.glide import Glide
from torchnewton.record import StreamedTape, Tape
from torchnewton.solvers import Auto, Plane, Solver
from torchnewton.vectors import is_distributed


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
EXACT = Regime(GaussNewton, Auto(), AutoDamping(), GeodesicAcceleration(), preconditioned=False)

# It does not: Kronecker factors of many, and the batch's own matrix in the plane of their direction and the last step.
PLANE = Regime(
    _for_plane,
    Plane(),
    LevenbergMarquardt(initial=1.0, minimum=1e-3, unit=Unit.NOISE),
    acceleration=None,
    preconditioned=True,
)


@dataclass(frozen=True)
class RegimeState:
    """What is remembered between steps; replaced, never changed.

    `exact` says which regime the last step was made in, None before the first; `cheap` whether a factorization is.
    `trust` is the running average of new ratios, `trial` counts the steps of a trial that are left, `next_trial` is the
    number of the step at which one begins. `other` are λ and its unit in the regime that is not in use.
    """

    exact: bool | None = None
    cheap: bool = False
    trust: float = 0.5
    trial: int = 0
    next_trial: int = 0
    other: tuple[float, float | None] | None = None


@dataclass(frozen=True)
class RegimeChoice:
    """`EXACT` where a factorization is cheap and its steps help on other data, else `PLANE`.

    A factorization is cheap where `Auto` finds one of at most `gradients` gradients or `flops` operations. Then a step
    on the same data as the last is `EXACT`. The first is made in `PLANE`, since nothing is known of its data.

    Where a step comes with other data, the last one is judged on them: its new ratio is the reduction there over the
    reduction predicted. An exact step fits its batch, noise included, and with noise that is no progress: new ratios
    are near 0. So on changing data, after `first_trial` steps and each time after `growth` times as many, `EXACT` is
    on trial for at most `trial` steps. The running average of the new ratios, the newest with
    weight 1 − `memory`, starts at ½; below `trust_in_trial` the trial ends, and the parameters return to where it
    began if the loss of the new data is lower there. Who passes stays, until the average falls below `least_trust`.

    `glide` makes the cheaper steps between full ones in `PLANE`; None for full steps alone.

    Always `EXACT` where no Kronecker factors can be made: on a streamed objective (`tn.over`), which keeps no graph,
    and for DTensors. Over several ranks the costs are those of the slowest and of the exchanges, and the Gram matrix is
    not to be had.
    """

    gradients: float = 20.0
    flops: float = 6e9
    memory: float = 0.8
    first_trial: int = 40
    growth: int = 8
    trial: int = 20
    trust_in_trial: float = 0.3
    least_trust: float = 0.1
    glide: Glide | None = field(default_factory=Glide)

    def is_cheap(self, tape: Tape | StreamedTape, share: Alone) -> bool:
        """Whether `EXACT` can be afforded on this tape; the same on all ranks."""
        if not self.allows_plane(tape):
            return True
        A = share.operator(GaussNewton(tape))
        options = Auto().options(A, tape.params)
        cheapest = min((flops for name, (flops, _) in options.items() if name != "CG"), default=float("inf"))
        limit = max(self.flops, self.gradients * share.largest(3 * tape.forward_flops))
        return cheapest <= limit and A.can_factor()

    def allows_plane(self, tape: Tape | StreamedTape) -> TypeGuard[Tape]:
        """Whether Kronecker factors can be made of this tape."""
        return isinstance(tape, Tape) and not any(is_distributed(p) for p in tape.params)

    def first(self, tape: Tape | StreamedTape, share: Alone) -> RegimeState:
        """For the first step."""
        cheap = self.is_cheap(tape, share)
        return RegimeState(exact=not self.allows_plane(tape), cheap=cheap, next_trial=self.first_trial)

    def judged(self, state: RegimeState, new_ratio: float) -> RegimeState:
        """With one more new ratio, which counts as at most 1 and at least −1."""
        trust = self.memory * state.trust + (1 - self.memory) * min(max(new_ratio, -1.0), 1.0)
        return replace(state, trust=trust)

    def next(self, state: RegimeState, step: int, same_data: bool) -> tuple[RegimeState, bool]:
        """The state for step number `step`, and whether a trial has failed."""
        if not state.exact:
            if state.cheap and same_data:
                return replace(state, exact=True, trust=0.5), False
            if not state.cheap or step < state.next_trial:
                return state, False
            later = self.growth * state.next_trial
            return replace(state, exact=True, trust=0.5, trial=self.trial, next_trial=later), False
        failed = state.trial > 0 and state.trust < self.trust_in_trial
        ends = failed or state.trust < self.least_trust
        return replace(state, exact=not ends, trial=0 if ends else max(state.trial - 1, 0)), failed
