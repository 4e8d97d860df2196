"""The optimizers: one step loop in `newton`, every named method a composition."""

from torchnewton.optim.acceleration import GeodesicAcceleration
from torchnewton.optim.dcasgd import DCASGD, DCASGDWorker
from torchnewton.optim.distributed_newton import DistributedNewton
from torchnewton.optim.entropy_sgd import EntropySGD
from torchnewton.optim.escape import SaddleEscape
from torchnewton.optim.hessian_free import HessianFree
from torchnewton.optim.newton import Newton
from torchnewton.optim.newton_cg import NewtonCG
from torchnewton.optim.newton_krylov import NewtonKrylov
from torchnewton.optim.report import StepReport
from torchnewton.optim.sgn import SGN
from torchnewton.optim.subsets import Subsets
from torchnewton.optim.worker_secant import WorkerSecant

__all__ = [
    "DCASGD",
    "SGN",
    "DCASGDWorker",
    "DistributedNewton",
    "EntropySGD",
    "GeodesicAcceleration",
    "HessianFree",
    "Newton",
    "NewtonCG",
    "NewtonKrylov",
    "SaddleEscape",
    "StepReport",
    "Subsets",
    "WorkerSecant",
]
