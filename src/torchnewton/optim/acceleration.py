"""The second-order correction of a Gauss-Newton direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torchnewton import vectors
from torchnewton.optim.point import Point
from torchnewton.record import UNDEFINED, RecordError
from torchnewton.vectors import Vector


@dataclass(frozen=True)
class GeodesicAcceleration:
    """d = v + ½a with (A + λI)a = −JᵀB z″, z″ the second derivative of the outputs along v.

    A Gauss-Newton direction v follows the tangent of the path on which the outputs move as the model wants; a is the
    path's acceleration, which keeps the step in a curved valley. z″ is a central difference over ±`spacing`·v. The
    correction is dropped where 2‖a‖ > `limit`·‖v‖.

    Cost: two forward passes, one backward pass, and one solve with a factorization that exists already.
    Source: Transtrum and Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares
    minimization", arXiv 1201.5885, with its constants but for `spacing` h, 0.1 there: rounding in float32, ε/h², would
    count for more than the fourth derivative. B takes the place of the identity for losses other than squares.
    """

    spacing: float = 0.3
    limit: float = 0.75

    def __post_init__(self) -> None:
        if not (0 < self.spacing < math.inf and self.limit >= 0):
            raise ValueError(
                f"GeodesicAcceleration: spacing={self.spacing} must be positive and finite, limit={self.limit} not "
                "negative."
            )

    def corrected(self, point: Point, velocity: Vector, solve: Callable[[Vector], Vector]) -> Vector:
        """The direction v + ½a, or v."""
        h = self.spacing
        try:
            ahead, behind = point.outputs(velocity, h), point.outputs(velocity, -h)
        except (RecordError, *UNDEFINED):  # the closure takes another course there
            return velocity
        second = [
            (a - 2 * z.detach() + b) / h**2 for a, z, b in zip(ahead, point.recorded.outputs, behind, strict=True)
        ]
        acceleration = solve(vectors.scale(point.pull_back(second), -1.0))
        size = vectors.norm(acceleration)
        if not 2 * size <= self.limit * vectors.norm(velocity):
            return velocity
        return vectors.add(velocity, acceleration, 0.5)
