"""The tape of an objective over many batches: its loss and its gradient, and passes with one graph at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.record.errors import RecordError
from torchnewton.record.over import Objective
from torchnewton.record.replay import (
    BufferSnapshot,
    Closure,
    RandomState,
    kept_gradients,
    same_random_numbers,
    scratch_buffers,
)
from torchnewton.record.tape import Tape, evaluated, record

Visit = Callable[[Tape, float], None]


class StreamedTape:
    """What one pass over the batches of an objective leaves: the mean loss and its gradient, no graph.

    `again` makes the same pass once more, batch by batch, for what needs a graph. `visit(tape, weight)` is shown the
    tape of every batch while it is alive. Buffers run through every pass as through the first, from the same values.

    Cost: one gradient of all batches. Memory: the graph of one batch and two vectors like the parameters.
    """

    def __init__(self, objective: Objective, params: Sequence[Tensor], visit: Visit | None = None) -> None:
        self.objective = objective
        self.params = list(params)
        self.lacks_curvature = False
        self.forward_flops = 0.0
        self._differentiates_parameters = False
        self._devices = [p.device for p in self.params]
        self.gradient = vectors.zeros_like(self.params)
        self.buffers = BufferSnapshot()
        start = RandomState(self._devices)
        self.random_state: RandomState | None = None
        try:
            with self.buffers.watch():
                total, loss = self._pass("gradient", lambda tape, weight: self._first(tape, weight, visit), False)
        except BaseException:
            self.buffers.restore()
            raise
        self.total_weight, self.loss = total, loss
        self.gradient = vectors.scale(self.gradient, 1 / total)
        self.random_state = None if start.is_current() else start

    def _first(self, tape: Tape, weight: float, visit: Visit | None) -> None:
        vectors.add_(self.gradient, tape.gradient, weight)
        self.lacks_curvature |= tape.has_rest
        self.forward_flops += tape.forward_flops
        self._differentiates_parameters |= tape.differentiates_parameters
        if visit is not None:
            with same_random_numbers(RandomState(self._devices), self._devices):
                visit(tape, weight)

    @property
    def returned(self) -> Tensor:
        """What a step returns: the loss."""
        return self.loss

    @property
    def descent(self) -> list[Tensor]:
        """−∇f."""
        return [-g for g in self.gradient]

    def evaluate(self) -> float:
        """f at the parameters' present values, on the same random numbers, leaving no trace."""
        total, weights = 0.0, 0.0
        with self.restarted():
            for closure, weight in self.objective.closures("loss"):
                total += weight * evaluated(closure, self.params, self._differentiates_parameters)
                weights += weight
        return total / weights

    @contextmanager
    def restarted(self) -> Iterator[None]:
        """Random numbers and buffers inside as at the start of the first pass; both are put back at the end."""
        with same_random_numbers(self.random_state, self._devices), scratch_buffers(self.buffers):
            yield

    def again(self, visit: Visit, *, create_graph: bool = True) -> None:
        """Record every batch once more and show it to `visit`; buffers and random state are put back."""

        def guarded(tape: Tape, weight: float) -> None:
            with same_random_numbers(RandomState(self._devices), self._devices):
                visit(tape, weight)

        with self.restarted():
            _, loss = self._pass("curvature", guarded, create_graph)
        now, first = float(loss), float(self.loss)
        tolerance = torch.finfo(loss.dtype).eps ** 0.5 * max(abs(first), 1e-8)
        if math.isfinite(first) and not abs(now - first) <= tolerance:
            raise RecordError(
                f"the average loss was {first:.8g} and is {now:.8g} now: build the operator anew after the parameters "
                "have moved, and let random numbers come from torch's global generator."
            )

    def _pass(self, stage: str, visit: Visit, create_graph: bool) -> tuple[float, Tensor]:
        """Record every batch and show it to `visit`; gives the sum of the weights and the mean loss."""
        total, loss = 0.0, torch.zeros((), dtype=self.params[0].dtype, device=self.params[0].device)
        with kept_gradients(self.params):
            for closure, weight in self.objective.closures(stage):
                total += weight
                loss = loss + weight * self._one(closure, weight, visit, create_graph)
        return total, loss / total

    def _one(self, closure: Closure, weight: float, visit: Visit, create_graph: bool) -> Tensor:
        """One batch; its graph is dropped on return."""
        tape = record(closure, self.params, create_graph=create_graph)
        visit(tape, weight)
        return tape.loss


def tape_of(objective: Closure, params: Sequence[Tensor], *, create_graph: bool = True) -> Tape | StreamedTape:
    """The tape of a closure, or of an objective: streamed unless it has a single batch."""
    if isinstance(objective, Objective) and objective.is_streamed:
        return StreamedTape(objective, params)
    return record(objective, params, create_graph=create_graph)
