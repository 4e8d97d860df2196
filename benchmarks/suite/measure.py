"""One timed run: CPU seconds of training alone, and the test value at points 3 % of the time apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

SPACING = 1.03  # from one evaluation to the next, in time
MARKS = 2000  # evaluations are at least this fraction of the budget apart
OVERTIME = 1.5  # a run that has reached its target goes on for half as long again

Step = Callable[[], float]  # makes a step on new data; returns its work in gradients of the method's own batch


class Point(NamedTuple):
    """The state at an evaluation; `gradients` counts the work in gradients of the method's own batch."""

    seconds: float
    step: int
    gradients: float
    value: float | None  # None where it is not finite


def run(
    step: Step, test: Callable[[], float], seconds: float, limit: float, is_reached: Callable[[float], bool]
) -> tuple[list[Point], str]:
    """Trains to `limit`; a run that reaches its target ends after 1.5 times that time, but not before `seconds`.

    Returns the curve and how the run ended.
    """
    used, number, gradients, due, end = 0.0, 0, 0.0, 0.0, limit
    points = [Point(0.0, 0, 0.0, test())]
    try:
        while used < end:
            start = time.process_time()
            gradients += step()
            used, number = used + time.process_time() - start, number + 1
            if used < min(due, end):
                continue
            start = time.process_time()
            value = test()
            cost = time.process_time() - start
            if not math.isfinite(value):
                points.append(Point(used, number, gradients, None))
                return points, "diverged"
            points.append(Point(used, number, gradients, value))
            if end == limit and is_reached(value):
                end = min(limit, max(seconds, OVERTIME * used))
            # no more time for evaluations than for training, whatever the test set costs
            due = max(used * SPACING, used + limit / MARKS, used + cost)
    except Exception as error:  # one method's failure must not end the suite: it is a result
        return points, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return points, "finished"
