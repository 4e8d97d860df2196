"""Damping and line search: numbers only."""

from torchnewton.globalization.damping import ConstantDamping, Damping, LevenbergMarquardt, ScheduledDamping
from torchnewton.globalization.line_search import Armijo, FullStep, LineSearch, SearchResult

__all__ = [
    "Armijo",
    "ConstantDamping",
    "Damping",
    "FullStep",
    "LevenbergMarquardt",
    "LineSearch",
    "ScheduledDamping",
    "SearchResult",
]
