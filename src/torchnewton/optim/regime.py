"""The two ways in which `Newton` without arguments makes a step, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

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
    glide: Glide | None = None


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
    glide=Glide(),
)


@dataclass(frozen=True)
class RegimeChoice:
    """`EXACT` where a factorization is cheap and its steps help on other data, else `PLANE`.

    The first step is `EXACT` where `Auto` finds a factorization of at most `gradients` gradients or `flops` operations.
    Where a step comes with other data, the last one is judged on them: `trust` is the running average, with weight
    1 − `memory` for the newest, of the reduction there over the reduction predicted; it starts at ½. Below
    `least_trust` the steps fit their batch and not the task: `PLANE` from then on. Always `EXACT` where no Kronecker
    factors can be made: on a streamed objective (`tn.over`), which keeps no graph, and for DTensors.
    Over several ranks the costs are those of the slowest and of the exchanges, and the Gram matrix is not to be had.
    """

    gradients: float = 20.0
    flops: float = 6e9
    memory: float = 0.9
    least_trust: float = 0.3

    def starts_exact(self, tape: Tape | StreamedTape, share: Alone) -> bool:
        """Whether a first step with this tape is `EXACT`; the same on all ranks."""
        if not self.allows_plane(tape):
            return True
        A = share.operator(GaussNewton(tape))
        options = Auto().options(A, tape.gradient)
        cheapest = min((flops for name, (flops, _) in options.items() if name != "CG"), default=float("inf"))
        limit = max(self.flops, self.gradients * share.largest(3 * tape.forward_flops))
        return cheapest <= limit and A.can_factor()

    def allows_plane(self, tape: Tape | StreamedTape) -> TypeGuard[Tape]:
        """Whether Kronecker factors can be made of this tape."""
        return isinstance(tape, Tape) and not any(is_distributed(p) for p in tape.params)

    def trust(self, trust: float, new_ratio: float) -> float:
        """The running average with one more ratio, which counts as at most 1 and at least −1."""
        return self.memory * trust + (1 - self.memory) * min(max(new_ratio, -1.0), 1.0)
