"""Exact steps that trust their batch: tried once they cost little beside the work so far, kept while the loss falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean


@dataclass(frozen=True)
class BoldState:
    """What is remembered between steps; replaced, never changed.

    `on` says whether steps are bold, `before` whether exact steps were made before them, `damping` what λ is to be
    after them. `losses` are those of the last exact steps, each before its step. `first` is the mean loss before bold
    steps began, `best` the lowest mean of a window since, `idle` the number of windows since that. `due` is the work
    from which bold steps are tried again.
    """

    on: bool = False
    before: bool = False
    damping: float = math.nan
    losses: tuple[float, ...] = ()
    first: float = math.inf
    best: float = math.inf
    idle: int = 0
    due: float = 0.0


@dataclass(frozen=True)
class Bold:
    """On changing data: exact steps whose λ follows each batch's own ratio, as if there were no noise.

    Such a step fits its batch. Without noise in the data that is the way to a loss of 0, though it may raise the loss
    of the next batch again and again; with noise the loss settles above that of careful steps, or goes astray. No
    single step tells which, the losses of batches not yet seen do, before each step, in windows of `window` steps.
    Bold steps go on while the mean of a window is at most `progress` times the lowest before, with `patience` windows
    in a row that are not. They end at once where it is more than `worse` times the mean before them.

    They are tried when `window` of them cost the share 1/`share` of the work so far, and again after `growth` times
    the work at which they ended; the unit is a step in `PLANE`.
    """

    window: int = 20
    progress: float = 0.9
    patience: int = 2
    worse: float = 2.5
    share: float = 5.0
    growth: float = 4.0

    def is_due(self, state: BoldState, work: float, price: float, losses: Sequence[float]) -> bool:
        """Whether bold steps are to be tried after `work`, for exact steps of `price`."""
        enough = max(self.share * self.window * price, state.due)
        return not state.on and work >= enough and 2 * len(losses) >= self.window

    def begun(self, state: BoldState, losses: Sequence[float], exact: bool, damping: float) -> BoldState:
        """From the losses of the last steps, exact or not; `damping` is what λ will be again after bold steps."""
        return BoldState(on=True, before=exact, damping=damping, first=fmean(losses), due=state.due)

    def seen(self, state: BoldState, loss: float, work: float) -> BoldState:
        """With the loss before an exact step; `on` turns False where bold steps are to end."""
        losses = (*state.losses, loss)
        if not state.on:
            return replace(state, losses=losses[-self.window // 2 :])
        if len(losses) < self.window:
            return replace(state, losses=losses)
        mean = fmean(losses)
        idle = 0 if mean <= self.progress * state.best else state.idle + 1
        if idle <= self.patience and mean <= self.worse * state.first:
            return replace(state, losses=(), best=min(state.best, mean), idle=idle)
        return BoldState(due=self.growth * work)
