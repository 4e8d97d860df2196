"""How noisy a gradient is, in units of the curvature."""

from __future__ import annotations

import torch

from torchnewton.curvature.groups import form_of_outputs
from torchnewton.curvature.shared import Shared, rows_of
from torchnewton.record import Piece, Tape, Term


def noise_scale(tape: Tape, generator: torch.Generator | None = None) -> float:
    """κ = Σ N‖∂f/∂z‖² / tr B over the terms of f, of N samples each, with the outputs z and B = ∂²f/∂z².

    A sample is what the loss takes for one: a target that is not ignored, a distribution over classes, else an index
    of the first dimension.

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
    """Σ N‖∂f/∂z‖² and tr B, the two parts of κ.

    With several processes, see `Shared`, each has its own f and z, and N counts the samples of all: in the same term,
    or, where the terms of the processes differ, in the largest of each.
    """
    shared, generator = shared or Shared(), generator or torch.default_generator
    squares = trace = 0.0
    counts = [_num_samples(term) for term in tape.terms]
    forms = shared.told(form_of_outputs(tape, shared))
    if all(form == forms[0] for form in forms):
        counts = shared.sums(counts)
    else:
        counts, shared = shared.sums([max(counts)]) * len(counts), Shared()
    for term, count in zip(tape.terms, counts, strict=True):
        u = [x.detach() for x in term.cotangents]
        signs = [rows.signs(x, generator) for x, rows in zip(u, rows_of(u, shared), strict=True)]
        curved = term.hessian_product(signs)
        squares += count * sum(float(x.square().sum()) for x in u)
        trace += sum(float((x * y).sum()) for x, y in zip(signs, curved, strict=True))
    return squares, trace


def _num_samples(term: Term) -> float:
    def count(piece: Piece) -> float:
        if piece.num_samples is not None:
            return piece.num_samples()
        return max(float(z.shape[0]) if z.dim() else 1.0 for z in piece.outputs)

    return max((count(piece) for piece in term.pieces), default=1.0)
