"""One solver per file; each needs `A @ v` and inner products only."""

from torchnewton.solvers.auto import Auto
from torchnewton.solvers.bicgstab import BiCGSTAB
from torchnewton.solvers.cg import CG
from torchnewton.solvers.direct import Direct
from torchnewton.solvers.dual import Dual
from torchnewton.solvers.heavy_ball import HeavyBall
from torchnewton.solvers.lanczos import Lanczos, LanczosResult, RitzValues
from torchnewton.solvers.minres import MINRES
from torchnewton.solvers.negative_curvature import AlongNegativeCurvature
from torchnewton.solvers.nystrom import Nystrom
from torchnewton.solvers.plane import Plane, PlaneResult
from torchnewton.solvers.preconditioners import BlockDiagonal, Jacobi, Preconditioner
from torchnewton.solvers.result import Operator, Solver, SolveResult, Status, UsesPreviousStep, uses_previous_step
from torchnewton.solvers.steihaug import SteihaugCG
from torchnewton.solvers.stopping import MartensProgress, MaxNorm, StoppingRule
from torchnewton.solvers.until_disturbed import UntilDisturbed
from torchnewton.solvers.warm_start import WarmStart

__all__ = [
    "CG",
    "MINRES",
    "AlongNegativeCurvature",
    "Auto",
    "BiCGSTAB",
    "BlockDiagonal",
    "Direct",
    "Dual",
    "HeavyBall",
    "Jacobi",
    "Lanczos",
    "LanczosResult",
    "MartensProgress",
    "MaxNorm",
    "Nystrom",
    "Operator",
    "Plane",
    "PlaneResult",
    "Preconditioner",
    "RitzValues",
    "SolveResult",
    "Solver",
    "Status",
    "SteihaugCG",
    "StoppingRule",
    "UntilDisturbed",
    "UsesPreviousStep",
    "WarmStart",
    "uses_previous_step",
]
