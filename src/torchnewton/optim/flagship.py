"""Newton without arguments: which regime makes a step, and the steps that glide."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import KFAC
from torchnewton.distributed import Alone, DataParallel
from torchnewton.optim.bold import Bold, BoldState
from torchnewton.optim.glide import Glide, GlideState
from torchnewton.optim.memory import Remembers, as_memory
from torchnewton.optim.point import Point, penalty
from torchnewton.optim.regime import EXACT, RegimeState
from torchnewton.record import UNDEFINED, BufferSnapshot, Closure, plain_gradient
from torchnewton.solvers import HeavyBall, SolveResult
from torchnewton.vectors import Vector

MOST_SOLVES_AGAIN = 8  # in a step, each with λ raised


class Flagship(Remembers):
    """What `Newton` does where it chooses its parts itself: see `RegimeChoice` and `Glide`."""

    data_parallel: DataParallel | None
    _is_given_search: bool  # then it chooses the length of every step
    _buffers: BufferSnapshot | None

    def _glided(self, closure: Closure, params: list[Tensor], decays: list[float]) -> tuple[Any] | None:
        """A gliding step from an ordinary backward pass; None where the next step needs a recorded one."""
        solver, kfac = self._glider(params), self._running
        if solver is None or self._buffers is None or not isinstance(kfac, KFAC) or kfac.is_due:
            return None
        buffers = self._buffers.renewed()
        try:
            with self._timed("record"):
                returned, gradient = plain_gradient(closure, params)
            self.report.gradient_equivalents += 1
            self.report.loss = float(returned)
            value = self.report.loss + penalty(params, decays)
            gradient = [g if w == 0 else g + w * p for g, p, w in zip(gradient, params, decays, strict=True)]
            if not self._glide(solver, params, gradient, value):
                buffers.restore()
                return None
        except UNDEFINED:
            buffers.restore()
            return None
        except BaseException:
            buffers.restore()
            raise
        kfac.skip()
        return (returned.detach() if isinstance(returned, Tensor) else returned,)

    @property
    def _gliding(self) -> Glide | None:
        """The rule for cheaper steps between full ones, in the plane."""
        return None if self.choice is None or self._is_given_search else self.choice.glide

    def _glider(self, params: list[Tensor]) -> HeavyBall | None:
        """What makes the next step if it is to glide."""
        glide = self._gliding
        if glide is None or self.momentum or self._memory["regime"]["exact"] is not False:
            return None
        return glide.solver(GlideState(**self._memory["glide"])) if self._previous_step(params) else None

    def _glide(
        self, solver: HeavyBall, params: list[Tensor], gradient: Vector, value: float, share: Alone | None = None
    ) -> bool:
        """A step without a model of the loss; False, and nothing done, where something is alarming."""
        memory, report, kfac, glide = self._memory, self.report, self._running, self._gliding
        state, last = GlideState(**memory["glide"]), self._previous_step(params)
        assert glide is not None  # as `_glider` has seen to
        assert kfac is not None
        assert last is not None
        if not math.isfinite(value) or glide.is_test_due(state, value):
            return False
        with self._timed("solve"):
            inverse, b = kfac.inverse(report.damping), vectors.scale(gradient, -1.0)
            M = inverse if share is None else share.preconditioner(inverse) or inverse
            result = solver.solve(M, b, last, M)
            if share is not None:
                result = share.agreed(result, b)
        report.gradient_norm = vectors.norm(gradient)
        if not (math.isfinite(report.gradient_norm) and vectors.is_finite(result.solution)):
            return False
        slopes = vectors.dot(gradient, result.solution), vectors.dot(gradient, last)
        self._move(params, result.solution, 1.0)
        memory["last"] = None
        memory["step"] += 1
        memory["glide"] = as_memory(glide.glided(state, value, *slopes))
        report.regime, report.solver, report.status = "plane", result.method, result.status.value
        memory["work"] += 1.0
        return True

    def _take_back(self, point: Point) -> bool:
        """After steps that were not tested: where they have not helped, back to where they began."""
        memory, glide, state = self._memory, self._gliding, GlideState(**self._memory["glide"])
        if glide is None or not glide.is_test_due(state, point.value):
            return False
        before = self._value_at_anchor(point)
        failed = glide.has_failed(point.value, before)
        memory["glide"] = as_memory(glide.taken_back(state) if failed else glide.passed(state))
        if failed:
            status = f"the last {state.gone} steps, not tested before, had raised the loss: taken back"
            self._return_to_anchor(point.params, status)
        return failed

    def _has_left_domain(self, params: list[Tensor]) -> bool:
        """Back to where steps that were not tested began, which have led to a point where the closure raises."""
        memory, glide, state = self._memory, self._gliding, GlideState(**self._memory["glide"])
        if glide is None or not state.gone:
            return False
        memory["glide"] = as_memory(glide.taken_back(state))
        self._return_to_anchor(params, "")
        return True

    def _value_at_anchor(self, point: Point) -> float:
        """The objective there, on the data of this step."""
        back = [self.state[p]["anchor"] - p for p in point.params]
        self.report.loss_evaluations += 1
        with self._timed("search"):
            return point.evaluate(back, 1.0)

    def _prepare_glide(self, point: Point, result: SolveResult) -> None:
        """After a full step over the plane: what the next ones need to glide."""
        glide = self._gliding
        if glide is None or self._memory["regime"]["exact"]:
            return
        memory, coefficients = self._memory, result.coefficients if self.report.accepted else ()
        state = glide.after(GlideState(**memory["glide"]), point.value, coefficients, memory["step"])
        memory["glide"] = as_memory(state)
        if state.left > 0:
            self._buffers = point.plain_buffers
            self._set_anchor(point.params)

    def _solves_again(self, result: SolveResult, same_data: bool) -> bool:
        """Whether a step that goes too far is solved again with λ raised, which turns it, and not shortened.

        So on the data of the last step, where what was factorized serves the next λ, too, and in bold steps.
        """
        free = self.choice is not None and not self._is_given_search
        exact = bool(self._memory["regime"]["exact"])
        return free and exact and (same_data or self._is_bold) and result.shifted is not None

    @property
    def _is_bold(self) -> bool:
        on: bool = self._memory["bold"]["on"]
        return on

    def _choose_regime(self, point: Point, same_data: bool) -> str:
        """Without arguments: the parts of this step; returns why the last ones are to be taken back, or nothing."""
        if self.choice is None:
            return ""
        memory, choice = self._memory, self.choice
        before = RegimeState(**memory["regime"])
        if before.exact is None:
            self._use(choice.first(point.tape, point.share), before)
            return ""
        if not choice.allows_plane(point.tape) or GlideState(**memory["glide"]).gone:
            self._use(before, before)
            return ""
        if choice.bold is not None and not same_data:
            was_bold = self._is_bold
            if self._choose_bold(choice.bold, point, before):
                return ""
            if was_bold:
                return "steps that trust their batches have raised the loss: taken back"
        if same_data:
            before = choice.asked_for_same_data(before, point.tape, point.share)
        state, failed = choice.next(before, memory["step"], same_data)
        self._use(state, before)
        if state.exact and not before.exact and state.trial:
            self._set_anchor(point.params)
        return "exact steps, on trial, have fitted their batches alone: taken back" if failed else ""

    def _choose_bold(self, rule: Bold, point: Point, before: RegimeState) -> bool:
        """Whether this step is bold; after the last bold one, what was before goes on."""
        memory, old = self._memory, BoldState(**self._memory["bold"])
        losses = old.losses if before.exact else GlideState(**memory["glide"]).losses
        state = rule.seen(old, point.value, memory["work"]) if before.exact else old
        if before.cheap and not old.on and rule.is_due(state, memory["work"], before.price, losses):
            damping = memory["damping"] if before.exact else EXACT.damping.start()
            state = rule.begun(state, losses, bool(before.exact), damping)
            self._set_anchor(point.params)
        memory["bold"] = as_memory(state)
        if old.on and not state.on:
            memory["damping"] = old.damping
            self._use(replace(before, exact=old.before, evidence=0.0, trial=0), before)
        elif state.on:
            self._use(replace(before, exact=True, evidence=0.0, trial=0), before)
        return state.on

    def _has_other_regime(self, point: Point) -> bool:
        """Whether this step is exact and need not be."""
        chosen = self.choice is not None and self.choice.allows_plane(point.tape)
        return chosen and bool(self._memory["regime"]["exact"])

    def _without_exact_steps(self, point: Point, error: BaseException) -> Any:
        """After an exact step that the closure does not allow, and that was undone: there will be no other."""
        before = RegimeState(**self._memory["regime"])
        self._use(replace(before, exact=False, price=math.inf, fixed=False, evidence=0.0, trial=0), before)
        self.report.accepted = False
        self.report.status = f"rejected: no exact step can be made, the next will be in the plane: {error}"
        return point.returned

    def _use(self, state: RegimeState, before: RegimeState) -> None:
        """The parts of a regime; each has a λ of its own."""
        memory = self._memory
        self.report.regime = "exact" if state.exact else "plane"
        memory["regime"] = as_memory(state)
        self._use_regime()
        if state.exact != before.exact:
            damping, scale = state.other or (self.damping.start(), None)
            other = None if before.exact is None else (memory["damping"], memory["scale"])
            memory.update(damping=damping, scale=scale, last=None, regime=as_memory(replace(state, other=other)))
