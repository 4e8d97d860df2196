"""Steps that use the coefficients of earlier ones, and the test that takes them back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median

from torchnewton.solvers import HeavyBall


@dataclass(frozen=True)
class GlideState:
    """What is remembered between steps; replaced, never changed.

    `coefficients` (α, μ) are those of the last full steps, `losses` the objectives before the last steps. `period` is
    the number of steps from one full step to the next, `left` how many steps are still to glide, `gone` how many have
    since the last full step, `pause` for how many full steps there is no gliding, `factor` the share h of α in use.
    `slope` is gᵀx of the last gliding step x, `downhill` the sum of their sizes and `overshot` that of the slopes which
    the next batches have found along the same steps.
    """

    coefficients: tuple[tuple[float, ...], ...] = ()
    losses: tuple[float, ...] = ()
    period: int = 2
    left: int = 0
    gone: int = 0
    pause: int = 0
    factor: float = 0.8
    slope: float = 0.0
    downhill: float = 0.0
    overshot: float = 0.0


@dataclass(frozen=True)
class Glide:
    """Between full steps over the plane of Mb and the last step x₀: x = hαMb + μx₀, with α and μ held.

    A full step fits α and μ to its batch by two forward passes and tests its loss by a third. Both coefficients change
    slowly, and what is fitted to one batch alone is noise: α and μ, here, are the medians of the last `memory` full
    steps, μ between 0 and `most`. A gliding step costs a gradient and a product with M, nothing else.

    What was not tested may go wrong. So on the batch after the last of them, or at once where the loss is `alarm` times
    the largest of the last ten or not finite, the loss is compared with that at the point where the gliding began. If
    it has grown by more than the share `tolerance` there, all these steps are taken back, half as many are made the
    next time, after `pause` full steps, and h shrinks. Else the number of gliding steps doubles, within bounds:
    the first `first` steps are full, since λ adapts in full steps alone, then at least one in two is, one in three
    after `patience` more steps, and so on to one in `longest`.

    h also follows the slopes. After a step x the gradient g₊ of the next batch tells what slope x has left behind. h
    shrinks where Σ g₊ᵀx exceeds the share `balance` of Σ |gᵀx| over the gliding steps, else it grows; it stays between
    `least` and 1. (Σ g₊ᵀx = 0 would minimize the next batch's loss, which is too short-sighted.)
    """

    longest: int = 20
    first: int = 15
    patience: int = 3
    memory: int = 5
    most: float = 0.8
    alarm: float = 1.3
    tolerance: float = 0.2
    balance: float = 0.2
    pause: int = 4
    growth: float = 1.05
    shrinkage: float = 0.7
    least: float = 0.25

    def solver(self, state: GlideState) -> HeavyBall | None:
        """What makes the next step if it is to glide."""
        if state.left <= 0 or len(state.coefficients) < self.memory:
            return None
        alpha, mu = (median(c) for c in zip(*state.coefficients, strict=True))
        return HeavyBall(state.factor * alpha, min(max(mu, 0.0), self.most)) if alpha > 0 else None

    def is_test_due(self, state: GlideState, value: float) -> bool:
        """Whether the steps since the last full one are to be judged at a point of objective `value`."""
        usual = max(state.losses, default=math.inf)
        return state.gone > 0 and (state.left <= 0 or not value - usual <= (self.alarm - 1) * abs(usual))

    def has_failed(self, value: float, before: float) -> bool:
        """Whether `value` is too large beside that where the gliding began, on the same data."""
        return math.isfinite(before) and not value - before <= self.tolerance * abs(before)

    def passed(self, state: GlideState) -> GlideState:
        """After a test that has been passed."""
        too_long = state.overshot > self.balance * state.downhill
        factor = max(self.shrinkage * state.factor, self.least) if too_long else min(self.growth * state.factor, 1.0)
        return replace(state, period=min(2 * state.period, self.longest), factor=factor, left=0, gone=0)

    def taken_back(self, state: GlideState) -> GlideState:
        """After one that has not."""
        factor = max(self.shrinkage * state.factor, self.least)
        period = max((state.gone + 1) // 2, 2)
        return replace(state, period=period, factor=factor, left=0, gone=0, pause=self.pause)

    def glided(self, state: GlideState, value: float, slope: float, slope_of_last: float) -> GlideState:
        """After a gliding step from a point of objective `value`; the slopes there along it and along the last step."""
        losses, before = (*state.losses, value)[-10:], state.slope
        state = replace(state, losses=losses, left=state.left - 1, gone=state.gone + 1, slope=slope)
        if state.gone == 1:
            return replace(state, downhill=0.0, overshot=0.0)
        downhill, overshot = state.downhill + abs(before), state.overshot + slope_of_last
        return replace(state, downhill=downhill, overshot=overshot)

    def after(self, state: GlideState, value: float, coefficients: tuple[float, ...], step: int) -> GlideState:
        """After full step number `step` from a point of objective `value`."""
        state = replace(state, losses=(*state.losses, value)[-10:])
        known = state.coefficients
        if len(coefficients) == 2:
            known = (*known, coefficients)[-self.memory :]
        too_early = step < self.first or state.pause > 0
        left = 0 if too_early else min(state.period, 2 + (step - self.first) // self.patience) - 1
        return replace(state, coefficients=known, left=left, gone=0, pause=max(state.pause - 1, 0))
