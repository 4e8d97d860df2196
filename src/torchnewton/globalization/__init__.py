"""Damping and line search: numbers only."""

from torchnewton.globalization.damping import (
    AutoDamping,
    ConstantDamping,
    Damping,
    LearnsFromNewData,
    LevenbergMarquardt,
    ScheduledDamping,
)
from torchnewton.globalization.line_search import Armijo, FullStep, LineSearch, SearchResult

__all__ = [
    "Armijo",
    "AutoDamping",
    "ConstantDamping",
    "Damping",
    "FullStep",
    "LearnsFromNewData",
    "LevenbergMarquardt",
    "LineSearch",
    "ScheduledDamping",
    "SearchResult",
]
