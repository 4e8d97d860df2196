"""Newton-type training for PyTorch: swap the optimizer, keep the loop."""

from torchnewton.curvature import GaussNewton, Jacobian
from torchnewton.globalization import (
    Armijo,
    AutoDamping,
    ConstantDamping,
    FullStep,
    LevenbergMarquardt,
    ScheduledDamping,
)
from torchnewton.optim import SGN, GeodesicAcceleration, Newton, StepReport
from torchnewton.record import RecordError, Tape, outputs, record
from torchnewton.solvers import CG, Auto, Direct, Dual, MartensProgress, MaxNorm, SolveResult, Status

__all__ = [
    "CG",
    "SGN",
    "Armijo",
    "Auto",
    "AutoDamping",
    "ConstantDamping",
    "Direct",
    "Dual",
    "FullStep",
    "GaussNewton",
    "GeodesicAcceleration",
    "Jacobian",
    "LevenbergMarquardt",
    "MartensProgress",
    "MaxNorm",
    "Newton",
    "RecordError",
    "ScheduledDamping",
    "SolveResult",
    "Status",
    "StepReport",
    "Tape",
    "outputs",
    "record",
]
