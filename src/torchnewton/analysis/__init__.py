"""What an operator tells about a model: its spectrum."""

from torchnewton.analysis.spectral import Density, Spectrum, spectrum

__all__ = ["Density", "Spectrum", "spectrum"]
