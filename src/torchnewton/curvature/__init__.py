"""One linear operator per file: what a solver multiplies with."""

from torchnewton.curvature.gauss_newton import GaussNewton, forward_flops
from torchnewton.curvature.jacobian import Jacobian
from torchnewton.curvature.operator import Diagonal, LinearOperator

__all__ = ["Diagonal", "GaussNewton", "Jacobian", "LinearOperator", "forward_flops"]
