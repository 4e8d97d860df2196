"""Whether a recorded loss is a mean or a sum over its samples, and over how many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

from torchnewton.record import Piece, Tape

_FACTORS = (1.0, 0.5)  # that losses have in front
_NEAR = 1e-3


class Kind(IntEnum):
    """What a loss call, or a closure, says of itself; a number that ranks tell each other."""

    MEAN = 0
    SUM = 1
    PERHAPS_MEAN = 2  # both fit, as for one sample: what others are
    PERHAPS_SUM = 3
    UNKNOWN = 4


def kind_and_samples(tape: Tape) -> tuple[Kind, float]:
    """By the weights w = ∂f/∂ℓ with which loss calls ℓ enter f.

    A mean is what is called so, and a sum, or entries without a reduction, of weights 1/n for n samples or entries:
    all, those that have a weight, or those of all loss calls. A sum is what has the weight 1. In both a factor ½ in
    front does not count. What is called a sum and has another weight is one; entries of other weights are what the
    other loss calls are. The number of samples is what the mean divides by, else the length of the outputs.
    """
    rows = sum(_length(piece) for piece in tape.pieces)
    entries = sum(piece.outputs[0].numel() for piece in tape.pieces)
    found = [_of_piece(piece, (rows, entries)) for piece in tape.pieces]
    return agreed(kind for kind, _ in found), sum(n for _, n in found)


def agreed(kinds: Iterable[Kind]) -> Kind:
    """What all are, or may be; unknown where some are means and others sums, or nothing is known of any."""
    met = set(kinds)
    sure = met & {Kind.MEAN, Kind.SUM}
    if sure or Kind.UNKNOWN in met:
        return sure.pop() if len(sure) == 1 else Kind.UNKNOWN
    return Kind.PERHAPS_SUM if met == {Kind.PERHAPS_SUM} else Kind.PERHAPS_MEAN


def _of_piece(piece: Piece, totals: Sequence[int]) -> tuple[Kind, float]:
    name, rows = None if piece.reduction is None else piece.reduction(), _length(piece)
    if name in ("mean", "batchmean"):
        return Kind.MEAN, rows if piece.divisor is None else piece.divisor()
    is_sum = name == "sum"
    perhaps = Kind.PERHAPS_SUM if is_sum else Kind.PERHAPS_MEAN
    weights = piece.weight.double().reshape(-1)
    used = weights[weights != 0]
    if not (rows and len(used)) or (name is None and piece.weight.numel() == 1):
        return perhaps, rows
    weight, spread, total = float(used.mean()), float(used.max() - used.min()), float(used.sum())
    if spread > _NEAR * abs(weight):
        return (Kind.MEAN if _is_factor(total) else Kind.UNKNOWN), rows
    counts: list[tuple[float, float]] = [(rows, rows), (piece.outputs[0].numel(), rows)]
    if not is_sum:
        counts += [(len(weights), rows), (len(used), rows * len(used) / len(weights))]
    if piece.num_samples is not None:
        counts.append((piece.num_samples(), piece.num_samples()))
    counts += [(total, rows) for total in totals]
    samples = next((n for count, n in counts if _is_factor(weight * count)), None)
    if _is_factor(weight):
        return (Kind.SUM if samples is None else perhaps), rows
    if samples is None:
        return (Kind.SUM if is_sum else Kind.UNKNOWN), rows
    return Kind.MEAN, samples


def _length(piece: Piece) -> int:
    z = piece.outputs[0]
    return len(z) if z.dim() else 1


def _is_factor(number: float) -> bool:
    return any(abs(number - factor) <= _NEAR * factor for factor in _FACTORS)
