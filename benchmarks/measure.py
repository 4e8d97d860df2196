"""One timed run: CPU seconds of training alone, and the test value at points 3 % of the time apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

SPACING = 1.03  # from one evaluation to the next, in time
MARKS = 2000  # evaluations are at least this fraction of the budget apart


class Point(NamedTuple):
    """The state at an evaluation; `gradients` counts the work in gradients of the method's own batch."""

    seconds: float
    step: int
    gradients: float
    value: float | None  # None where it is not finite


@dataclass
class Trial:
    """What a run needs: `draw` gives the loss on a new batch, `test` the test value."""

    optimizer: torch.optim.Optimizer
    draw: Callable[[], Callable[[], Tensor]]
    test: Callable[[], float]


def run(trial: Trial, seconds: float, limit: float, is_reached: Callable[[float], bool]) -> tuple[list[Point], str]:
    """Trains for `seconds`, and on to `limit` until `is_reached(value)`; the curve and how it ended."""
    used, step, gradients, due, reached = 0.0, 0, 0.0, 0.0, False
    points = [Point(0.0, 0, 0.0, trial.test())]
    try:
        while used < (end := seconds if reached else limit):
            spent, work = timed_step(trial)
            used, gradients, step = used + spent, gradients + work, step + 1
            if used >= min(due, end):
                value = trial.test()
                if not math.isfinite(value):
                    points.append(Point(used, step, gradients, None))
                    return points, "diverged"
                points.append(Point(used, step, gradients, value))
                reached = reached or is_reached(value)
                due = max(used * SPACING, used + seconds / MARKS)
    except Exception as error:  # one method's failure must not end the suite: it is a result
        return points, f"{type(error).__name__}: {error}"
    return points, "finished"


def timed_step(trial: Trial) -> tuple[float, float]:
    """One step on a new batch: its CPU seconds, drawing the batch included, and its work in gradients."""
    start, calls = time.process_time(), 0
    loss = trial.draw()

    def closure() -> Any:
        nonlocal calls
        calls += 1
        trial.optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    trial.optimizer.step(closure)
    spent = time.process_time() - start
    report = getattr(trial.optimizer, "report", None)
    return spent, report.gradient_equivalents if report else calls
