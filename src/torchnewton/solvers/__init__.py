"""One solver per file; each needs `A @ v` and inner products only."""

from torchnewton.solvers.auto import Auto
from torchnewton.solvers.cg import CG
from torchnewton.solvers.direct import Direct
from torchnewton.solvers.dual import Dual
from torchnewton.solvers.result import Operator, Solver, SolveResult, Status
from torchnewton.solvers.stopping import MartensProgress, MaxNorm, StoppingRule

__all__ = [
    "CG",
    "Auto",
    "Direct",
    "Dual",
    "MartensProgress",
    "MaxNorm",
    "Operator",
    "SolveResult",
    "Solver",
    "Status",
    "StoppingRule",
]
