"""Closure → tape: what a run of the user's unchanged closure tells."""

from torchnewton.record.call import LayerCall
from torchnewton.record.errors import UNDEFINED, RecordError, refuse_complex
from torchnewton.record.over import Objective, Progress, Weights, over
from torchnewton.record.pieces import Piece
from torchnewton.record.plain import plain_gradient
from torchnewton.record.recorder import outputs
from torchnewton.record.replay import (
    BufferSnapshot,
    Closure,
    RandomState,
    eager_code,
    kept_gradients,
    moved,
    same_random_numbers,
)
from torchnewton.record.samples import NotPerSampleError, PerSample
from torchnewton.record.stream import StreamedTape, tape_of
from torchnewton.record.tape import Tape, record
from torchnewton.record.term import Term, warn_about_rest

__all__ = [
    "UNDEFINED",
    "BufferSnapshot",
    "Closure",
    "LayerCall",
    "NotPerSampleError",
    "Objective",
    "PerSample",
    "Piece",
    "Progress",
    "RandomState",
    "RecordError",
    "StreamedTape",
    "Tape",
    "Term",
    "Weights",
    "eager_code",
    "kept_gradients",
    "moved",
    "outputs",
    "over",
    "plain_gradient",
    "record",
    "refuse_complex",
    "same_random_numbers",
    "tape_of",
    "warn_about_rest",
]
