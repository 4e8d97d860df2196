"""Kronecker-factored curvature."""

from torchnewton.curvature.kfac.kfac import KFAC, Shared

__all__ = ["KFAC", "Shared"]
