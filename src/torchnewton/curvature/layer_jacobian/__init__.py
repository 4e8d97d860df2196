"""The Jacobian by layers: their inputs and the cotangents of every output at each of them."""

from torchnewton.curvature.layer_jacobian.operator import LayerJacobian

__all__ = ["LayerJacobian"]
