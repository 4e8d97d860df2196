"""The Hessian by the complex step: pairs of real tensors, a table of rules, one run of the closure a product."""

from torchnewton.curvature.complex_step import (  # the tables of rules fill themselves
    activations,
    functions,
    layers,
    linear,
    losses,
    products,
    recurrent,
    reductions,
)
from torchnewton.curvature.complex_step.operator import ComplexStepHessian
from torchnewton.curvature.complex_step.pair import ComplexPair, complex_step_rule

__all__ = [
    "ComplexPair",
    "ComplexStepHessian",
    "activations",
    "complex_step_rule",
    "functions",
    "layers",
    "linear",
    "losses",
    "products",
    "recurrent",
    "reductions",
]
