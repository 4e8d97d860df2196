"""A real recording that leaves no trace: what the complex step is checked against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from torchnewton.record import Closure, Tape, record
from torchnewton.record.replay import BufferSnapshot, RandomState, kept_gradients, same_random_numbers, scratch_buffers


def recorded(
    closure: Closure,
    params: Sequence[Tensor],
    values: Sequence[Tensor] | None = None,
    random_state: RandomState | None = None,
    buffers: BufferSnapshot | None = None,
) -> Tape:
    """A recording at `values`, by default where the parameters are, on the random numbers that come next.

    It starts from `buffers`, by default as they are.

    Buffers, gradients, generators and parameters are afterwards what they were.
    """
    devices = [p.device for p in params]
    state = RandomState(devices) if random_state is None else random_state
    with (
        kept_gradients(params),
        same_random_numbers(state, devices),
        scratch_buffers(buffers),
        _placed(params, values),
    ):
        return record(closure, params, create_graph=False)


@contextmanager
def _placed(params: Sequence[Tensor], values: Sequence[Tensor] | None) -> Iterator[None]:
    """Other data in the parameters; a graph that was recorded before keeps its own."""
    now = [p.data for p in params]
    try:
        if values is not None:
            for p, x in zip(params, values, strict=True):
                p.data = x
        yield
    finally:
        for p, x in zip(params, now, strict=True):
            p.data = x
