"""Damping, line search and trust region: numbers only."""

from torchnewton.globalization.damping import (
    AutoDamping,
    ConstantDamping,
    Damping,
    LearnsFromNewData,
    LevenbergMarquardt,
    ScheduledDamping,
    Unit,
)
from torchnewton.globalization.line_search import Armijo, FullStep, LineSearch, SearchResult
from torchnewton.globalization.trust_region import TrustRegion

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
    "TrustRegion",
    "Unit",
]
