"""The two ways in which `Newton` without arguments makes a step, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchnewton.curvature import DifferenceJacobian, GaussNewton, LinearOperator
from torchnewton.globalization import AutoDamping, Damping, LevenbergMarquardt, Unit
from torchnewton.optim.acceleration import GeodesicAcceleration
from torchnewton.record import StreamedTape, Tape
from torchnewton.solvers import Auto, Plane, Solver


@dataclass(frozen=True)
class Regime:
    """What a step is composed of, in the words of `Newton`."""

    curvature: Callable[[Tape], LinearOperator]
    solver: Solver
    damping: Damping
    acceleration: GeodesicAcceleration | None
    preconditioned: bool


def _by_differences(tape: Tape) -> GaussNewton:
    return GaussNewton(tape, DifferenceJacobian(tape))


# One batch says enough: its Gauss-Newton matrix, factorized.
EXACT = Regime(GaussNewton, Auto(), AutoDamping(), GeodesicAcceleration(), preconditioned=False)

# It does not: Kronecker factors of many, and the batch's own matrix in the plane of their direction and the last step.
PLANE = Regime(
    _by_differences,
    Plane(),
    LevenbergMarquardt(initial=1.0, minimum=1e-3, unit=Unit.NOISE),
    acceleration=None,
    preconditioned=True,
)


@dataclass(frozen=True)
class RegimeChoice:
    """`EXACT` where a factorization is cheap and its steps help on other data, else `PLANE`.

    The first step is `EXACT` where `Auto` finds a factorization of at most `gradients` gradients or `flops` operations.
    Where a step comes with other data, the last one is judged on them: `trust` is the running average, with weight
    1 − `memory` for the newest, of the reduction there over the reduction predicted; it starts at ½. Below
    `least_trust` the steps fit their batch and not the task: `PLANE` from then on. On a streamed objective (`tn.over`)
    always `EXACT`: it keeps no graph for the Kronecker factors to be made of.
    """

    gradients: float = 20.0
    flops: float = 6e9
    memory: float = 0.9
    least_trust: float = 0.1

    def starts_exact(self, tape: Tape | StreamedTape) -> bool:
        """Whether a first step with this tape is `EXACT`."""
        if isinstance(tape, StreamedTape):
            return True
        A = GaussNewton(tape)
        options = Auto().options(A, tape.gradient)
        cheapest = min((flops for name, (flops, _) in options.items() if name != "CG"), default=float("inf"))
        limit = max(self.flops, self.gradients * 3 * tape.forward_flops)
        return cheapest <= limit and A.can_factor()

    def trust(self, trust: float, new_ratio: float) -> float:
        """The running average with one more ratio, which counts as at most 1 and at least −1."""
        return self.memory * trust + (1 - self.memory) * min(max(new_ratio, -1.0), 1.0)
