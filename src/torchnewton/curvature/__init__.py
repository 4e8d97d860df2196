"""One linear operator per file: what a solver multiplies with."""

from torchnewton.curvature.average import Average
from torchnewton.curvature.block_diagonal import Blocks
from torchnewton.curvature.complex_step import ComplexPair, ComplexStepHessian, complex_step_rule
from torchnewton.curvature.difference_jacobian import DifferenceJacobian
from torchnewton.curvature.directional import Autodiff, ComplexStep, FiniteDifference, directional_derivative
from torchnewton.curvature.estimate import Estimate
from torchnewton.curvature.fisher import EmpiricalFisher
from torchnewton.curvature.gauss_newton import GaussNewton
from torchnewton.curvature.gram import Gram
from torchnewton.curvature.halves import Halves
from torchnewton.curvature.hessian import Hessian
from torchnewton.curvature.jacobian import Jacobian
from torchnewton.curvature.kfac import KFAC
from torchnewton.curvature.layer_jacobian import LayerJacobian
from torchnewton.curvature.noise import noise_parts, noise_scale
from torchnewton.curvature.operator import Diagonal, LinearOperator
from torchnewton.curvature.shared import Rows, Shared

__all__ = [
    "KFAC",
    "Autodiff",
    "Average",
    "Blocks",
    "ComplexPair",
    "ComplexStep",
    "ComplexStepHessian",
    "Diagonal",
    "DifferenceJacobian",
    "EmpiricalFisher",
    "Estimate",
    "FiniteDifference",
    "GaussNewton",
    "Gram",
    "Halves",
    "Hessian",
    "Jacobian",
    "LayerJacobian",
    "LinearOperator",
    "Rows",
    "Shared",
    "complex_step_rule",
    "directional_derivative",
    "noise_parts",
    "noise_scale",
]
