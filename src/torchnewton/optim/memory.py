"""What an optimizer remembers between steps, and its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import LinearOperator, Shared
from torchnewton.globalization import Damping, LearnsFromNewData, TrustRegion, Unit
from torchnewton.optim.acceleration import GeodesicAcceleration
from torchnewton.optim.bold import BoldState
from torchnewton.optim.complete_state import CompleteState, as_before, completed, first_parameter
from torchnewton.optim.glide import GlideState
from torchnewton.optim.point import Curvature, Point
from torchnewton.optim.regime import EXACT, PLANE, RegimeChoice, RegimeState
from torchnewton.optim.report import StepReport
from torchnewton.record import Tape
from torchnewton.solvers import Operator, Solver, uses_previous_step
from torchnewton.vectors import Vector


def as_memory(state: BoldState | GlideState | RegimeState) -> dict[str, Any]:
    """Its fields; they are numbers and tuples, which need no copies: `asdict` took a tenth of a small gliding step."""
    return dict(vars(state))


class RunningPreconditioner(Protocol):
    """An approximation of (A + λI)⁻¹ for every λ that learns from each step; `inverse` gives one to multiply with."""

    def update(self, tape: Tape, shared: Shared | None = None, /) -> float:
        """Learn from the step's tape, once a step; returns the passes through the network that took, in gradients.

        `shared` makes statistics those of all processes: see `Shared`.
        """
        ...

    def inverse(self, damping: float, /) -> Operator:
        """The approximation for this λ."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Continue from it."""
        ...


class Remembers(CompleteState):
    """The parts a step is made of, and the memory of `Newton`: numbers with the first parameter, vectors with each."""

    curvature: Curvature
    solver: Solver
    damping: Damping
    acceleration: GeodesicAcceleration | None
    preconditioner: RunningPreconditioner | None
    trust_region: TrustRegion | None
    momentum: float
    choice: RegimeChoice | None
    report: StepReport
    _correction: GeodesicAcceleration | None  # that of every regime that has one
    _running: RunningPreconditioner | None
    _untaught: dict[str, Any]  # the state of `_running` before the first step

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; that of the preconditioner is in it.

        Complete before the first step, too, so that `torch.distributed.checkpoint` finds every place to load into.
        """
        first = self._first_memory()
        if self._running is not None:
            first["preconditioner"] = self._running.state_dict()
        chooses = self.choice is not None
        entries = {"last_step": chooses or self._needs_last_step, "anchor": chooses, "momentum": self.momentum > 0}
        names = [name for name, is_kept in entries.items() if is_kept]
        return completed(self, super().state_dict(), first, lambda p, _: {name: torch.zeros_like(p) for name in names})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`."""
        state_dict = as_before(state_dict, [*self._first_memory(), "preconditioner"])
        kept = [state.pop("preconditioner") for state in state_dict["state"].values() if "preconditioner" in state]
        super().load_state_dict(state_dict)  # which casts tensors to the parameters' dtype
        if self._running is not None and kept:
            self._running.load_state_dict(kept[0])
        self._use_regime()

    @property
    def _needs_last_step(self) -> bool:
        return isinstance(self.damping, LearnsFromNewData) or uses_previous_step(self.solver)

    def _find_scale(self, point: Point, A: LinearOperator, gradient: Vector) -> None:
        """The unit of λ: of the curvature at the first step, of the noise as a running average."""
        memory, unit = self._memory, self.damping.unit
        if unit is Unit.ABSOLUTE:
            memory["scale"] = 1.0
        elif unit is Unit.CURVATURE and memory["scale"] is None and self.report.gradient_norm > 0:
            curvature = vectors.dot(gradient, A @ gradient) / vectors.dot(gradient, gradient)
            memory["scale"] = curvature if math.isfinite(curvature) and curvature > 0 else 1.0
            self.report.products += 1
        elif unit is Unit.NOISE and (memory["scale"] is None or memory["step"] < 10 or memory["step"] % 10 == 0):
            noise = point.share.noise_scale(point.recorded, torch.Generator().manual_seed(memory["step"]))
            old = memory["scale"]
            if not (math.isfinite(noise) and noise > 0):
                noise = old or 1.0
            memory["scale"] = noise if old is None else 0.7 * old + 0.3 * noise

    def _averaged(self, point: Point) -> tuple[Vector, Vector]:
        """The running average m of gradients, and m / (1 − βᵗ)."""
        if not self.momentum:
            return [], point.gradient
        beta, t = self.momentum, self._memory["step"] + 1
        old = [self.state[p].get("momentum", torch.zeros_like(p)) for p in point.params]
        average = vectors.add(vectors.scale(old, beta), point.gradient, 1 - beta)
        return average, vectors.scale(average, 1 / (1 - beta**t))

    def _use_regime(self) -> None:
        """Take the parts of the regime that is remembered."""
        exact = self._memory["regime"]["exact"]
        if self.choice is None or exact is None:
            return
        regime = EXACT if exact else PLANE
        self.curvature, self.solver, self.damping = regime.curvature, regime.solver, regime.damping
        self.acceleration = None if regime.acceleration is None else self._correction
        self.preconditioner = self._running if regime.preconditioned else None

    def _previous_step(self, params: Iterable[Tensor]) -> Vector | None:
        """The last step that was made, where it moved the same parameters."""
        steps = [self.state[p].get("last_step") for p in params]
        known = [d for d in steps if d is not None]
        return known if len(known) == len(steps) else None

    def _move(self, params: list[Tensor], d: Vector, step_length: float) -> None:
        """θ ← θ + αd."""
        self.report.accepted, self.report.step_length = True, step_length
        vectors.add_(params, d, step_length)
        if self._needs_last_step:
            for p, x in zip(params, d, strict=True):
                self.state[p]["last_step"] = x * step_length

    def _undoing(self, params: list[Tensor]) -> Callable[[], None]:
        """What puts parameters, state and preconditioner back to how they are now."""
        values = vectors.clone(params)
        saved = {p: dict(self.state[p]) for group in self.param_groups for p in group["params"] if p in self.state}
        running = None if self._running is None else self._running.state_dict()

        def undo() -> None:
            for p, value in zip(params, values, strict=True):
                p.data.copy_(value)
            if self._running is not None and running is not None:
                self._running.load_state_dict(running)
            for p, state in saved.items():
                self.state[p] = state
            self._use_regime()

        return undo

    def _notice(self, trained: tuple[int, ...]) -> None:
        """Where other parameters are trained than in the last step, forget what was learned of those."""
        memory = self._memory
        if memory["trained"] not in (None, trained):
            for state in self.state.values():
                for name in ("anchor", "last_step"):
                    state.pop(name, None)
            if self._running is not None:
                self._running.load_state_dict(self._untaught)
            memory["last"] = None
            if self.choice is not None:
                memory.update({**self._first_memory(), "checked": memory["checked"], "warned": memory["warned"]})
        memory["trained"] = trained

    def _set_anchor(self, params: Iterable[Tensor]) -> None:
        """Where the next steps may be taken back to."""
        for p in params:
            self.state[p]["anchor"] = p.detach().clone()

    def _return_to_anchor(self, params: Iterable[Tensor], status: str) -> None:
        for p in params:
            p.copy_(self.state[p].pop("anchor"))
            self.state[p].pop("last_step", None)
        self.report.status = status

    @property
    def _memory(self) -> dict[str, Any]:
        """What the optimizer remembers between steps; kept, as in `torch.optim.LBFGS`, with the first parameter."""
        state: dict[str, Any] = self.state[first_parameter(self)]
        if "damping" not in state:
            state.update(self._first_memory())
        return state

    def _first_memory(self) -> dict[str, Any]:
        """Of an optimizer that has made no step."""
        scale = 1.0 if self.damping.unit is Unit.ABSOLUTE else None
        found: dict[str, Any] = {
            "step": 0,
            "damping": self.damping.start(),
            "scale": scale,
            "last": None,
            "trained": None,
            "glide": as_memory(GlideState()),
            "regime": as_memory(RegimeState()),
            "bold": as_memory(BoldState()),
            "work": 0.0,
        }
        found.update(products=False, checked=False, warned=False)
        if self.trust_region is not None:
            params = [p.detach() for group in self.param_groups for p in group["params"]]
            found["radius"] = self.trust_region.start(vectors.norm(params))
        return found

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[part] = self.report.seconds.get(part, 0.0) + time.perf_counter() - start
