"""The parts of `Newton`, checked where they are given and not where a step needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchnewton.globalization import Damping

# What each part must have, and what to give.
_PARTS = {
    "solver": (("solve",), "a solver, as tn.CG()"),
    "damping": (
        ("start", "update", "raised", "unit", "damped_model", "full_step"),
        "a number or a rule, as tn.LevenbergMarquardt()",
    ),
    "line_search": (("search",), "a line search, as tn.Armijo()"),
    "trust_region": (("start", "search", "shrunk"), "a trust region, as tn.TrustRegion(radius=0.1)"),
    "preconditioner": (
        ("update", "inverse", "state_dict", "load_state_dict"),
        "one that learns from every step, as tn.KFAC(); a fixed one, `M @ v`, is an argument of a solver's solve()",
    ),
    "acceleration": (("corrected",), "a correction, as tn.GeodesicAcceleration()"),
    "escape": (("better",), "a way out, as tn.SaddleEscape()"),
}


def check_parts(name: str, **parts: Any) -> None:
    """Raise `ValueError` for the first part that is given, not None, and none of its kind."""
    for argument, part in parts.items():
        needed, example = _PARTS[argument]
        if part is not None and (isinstance(part, type) or not all(hasattr(part, what) for what in needed)):
            raise ValueError(f"{name}: {argument}={part!r} must be {example}.")


def check_curvature(name: str, curvature: Any) -> None:
    """Raise `ValueError` unless it can be called with a tape."""
    if not callable(curvature):
        raise ValueError(
            f"{name}: curvature={curvature!r} must make an operator from a tape, as tn.GaussNewton or tn.Hessian does."
        )


def as_rule(damping: float | Damping, rule: Callable[[float], Damping]) -> Damping:
    """The rule itself, or `rule` of a number."""
    return rule(damping) if isinstance(damping, (int, float)) else damping
