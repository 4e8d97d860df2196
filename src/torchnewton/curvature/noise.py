"""How noisy a gradient is, in units of the curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from torchnewton.curvature.shared import Shared, rows_of
from torchnewton.record import Tape, Term

_CLASSES_SECOND = {"cross_entropy", "nll_loss"}


def noise_scale(tape: Tape, generator: torch.Generator | None = None) -> float:
    """κ = Σ N‖∂f/∂z‖² / tr B over the terms of f, the outputs z of N samples each, B = ∂²f/∂z².

    For a mean over N samples with derivatives rₙ and Hessians Bₙ of their own losses κ = Σ‖rₙ‖² / Σ tr Bₙ. The noise
    of such a gradient has the covariance F/N, F the mean of the outer products of the samples' gradients, and F ≈ κG
    as far as rₙ and Bₙ do not depend on the Jacobian. κ is 1 for a cross entropy whose probabilities are right, 2f/C
    for the mean squared error f of C numbers a sample, small where the data are fitted. A factor on f is one on κ.

    tr B is estimated by one product with random signs, exact for a diagonal B. Cost: no pass through the network.
    0 where the loss has no split or no curvature.
    """
    squares, trace = noise_parts(tape, generator)
    return squares / trace if trace > 0 else 0.0


def noise_parts(
    tape: Tape, generator: torch.Generator | None = None, shared: Shared | None = None
) -> tuple[float, float]:
    """Σ N‖∂f/∂z‖² and tr B, the two parts of κ; for several processes, each of its samples, see `Shared`."""
    shared, generator = shared or Shared(), generator or torch.default_generator
    squares = trace = 0.0
    for term in tape.terms:
        u = [x.detach() for x in term.cotangents]
        signs = [rows.signs(x, generator) for x, rows in zip(u, rows_of(u, shared), strict=True)]
        curved = term.hessian_product(signs)
        squares += _num_samples(term) * sum(float(x.square().sum()) for x in u)
        trace += sum(float((x * y).sum()) for x, y in zip(signs, curved, strict=True))
    return squares, trace


def _num_samples(term: Term) -> int:
    def count(name: str, z: Tensor) -> int:
        classes_second = name in _CLASSES_SECOND and z.dim() > 1
        return z.numel() // z.shape[1] if classes_second else z.shape[0] if z.dim() else 1

    return max((count(piece.name, z) for piece in term.pieces for z in piece.outputs), default=1)
