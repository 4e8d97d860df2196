"""Kronecker-factored curvature."""

from torchnewton.curvature.kfac.kfac import KFAC

__all__ = ["KFAC"]
