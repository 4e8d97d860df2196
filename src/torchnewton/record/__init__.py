"""Closure → tape: what a run of the user's unchanged closure tells."""

from torchnewton.record.errors import RecordError
from torchnewton.record.recorder import LayerCall, outputs
from torchnewton.record.replay import BufferSnapshot, Closure, moved
from torchnewton.record.samples import NotPerSampleError, PerSample
from torchnewton.record.tape import Tape, record
from torchnewton.record.term import Piece, Term, warn_about_rest

__all__ = [
    "BufferSnapshot",
    "Closure",
    "LayerCall",
    "NotPerSampleError",
    "PerSample",
    "Piece",
    "RecordError",
    "Tape",
    "Term",
    "moved",
    "outputs",
    "record",
    "warn_about_rest",
]
