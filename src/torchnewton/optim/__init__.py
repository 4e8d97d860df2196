"""The optimizers: one step loop in `newton`, every named method a composition."""

from torchnewton.optim.acceleration import GeodesicAcceleration
from torchnewton.optim.newton import Newton
from torchnewton.optim.report import StepReport
from torchnewton.optim.sgn import SGN

__all__ = ["SGN", "GeodesicAcceleration", "Newton", "StepReport"]
