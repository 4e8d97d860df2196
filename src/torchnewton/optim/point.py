"""Where a step starts: the objective, its gradient, and trials around it that leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import Diagonal, LinearOperator
from torchnewton.distributed import DataParallel, average_share, record_share
from torchnewton.record import (
    UNDEFINED,
    BufferSnapshot,
    Closure,
    Objective,
    RecordError,
    StreamedTape,
    Tape,
)
from torchnewton.vectors import Vector

Curvature = Callable[[Tape], LinearOperator]


def penalty(params: Sequence[Tensor], weight_decay: Sequence[float]) -> float:
    """½Σ w‖θ‖²."""
    decayed = [(p.detach(), w) for p, w in zip(params, weight_decay, strict=True) if w]
    return 0.5 * vectors.dot([w * p for p, w in decayed], [p for p, _ in decayed])


class Point:
    """The objective F(θ) = f(θ) + ½Σ w‖θ‖² recorded at the parameters' values, w the weight decay of each parameter.

    `loss` is f, `value` is F, `gradient` is ∇F. Parameters change in `move` only. BatchNorm and other buffers have
    moved once, in the recorded run; `settle` puts them there again whatever ran since, `undo` puts them back to where
    they were before it. With `parallel` the objective is that of all processes: `share` is the part of this one.
    """

    def __init__(
        self,
        closure: Closure,
        params: Sequence[Tensor],
        weight_decay: Sequence[float],
        *,
        create_graph: bool = True,
        parallel: DataParallel | None = None,
    ) -> None:
        self.params = list(params)
        self.weight_decay = list(weight_decay)
        self.closure = closure
        self.tape, self.share = record_share(closure, self.params, parallel, create_graph=create_graph)
        self._settled = [self.tape.buffers.renewed()]
        self.loss = self.share.total(lambda: float(self.tape.loss))
        self.value = self.loss + self._penalty()
        self.gradient = self.share.gradient(self.tape)
        if any(self.weight_decay):  # else the tape's own list, whose preimage is known
            self.gradient = [
                g if w == 0 else g + w * p.detach()
                for g, p, w in zip(self.gradient, self.params, self.weight_decay, strict=True)
            ]

    @property
    def recorded(self) -> Tape:
        """The tape with its graph, which a streamed objective does not keep."""
        if isinstance(self.tape, StreamedTape):
            raise RecordError(
                "the preconditioner or second-order correction of this optimizer needs the graph of the whole loss, "
                "which tn.over does not keep: leave it out (preconditioner=None), or give a closure on one batch."
            )
        return self.tape

    @property
    def plain_buffers(self) -> BufferSnapshot | None:
        """The buffers the closure moves, if what it returns is the whole objective on this process, else None."""
        returned = self.tape.returned
        whole = isinstance(returned, Tensor) and returned.numel() == 1 and isinstance(self.tape, Tape)
        alone = self.share.parallel is None
        return (
            self.tape.buffers if whole and alone and abs(float(returned) - self.loss) <= 1e-6 * abs(self.loss) else None
        )

    def _penalty(self) -> float:
        with self.share.agreeing():
            return penalty(self.params, self.weight_decay)

    def require_repeatable(self) -> None:
        """Raise `RecordError` unless the closure gives the same loss again."""
        self.share.check_same(self.params)
        again = self.share.total(self.tape.evaluate)
        tolerance = torch.finfo(self.params[0].dtype).eps ** 0.5 * max(abs(self.loss), 1e-8)
        if not abs(again - self.loss) <= tolerance:
            raise RecordError(
                f"the closure gave {self.loss:.8g} and then {again:.8g} at the same parameters and the same random "
                "numbers: a Newton step evaluates it several times, so draw the batch before step() and keep it fixed "
                "inside the closure."
            )

    def model(self, make: Curvature, curvature: Closure | None) -> tuple[LinearOperator, Tape | StreamedTape]:
        """The curvature of F, from this tape or another closure's, and that tape."""
        objective = self.closure if curvature is None else curvature
        if isinstance(objective, Objective) and objective.is_streamed:
            first = self.tape if curvature is None else None
            with first.restarted() if isinstance(first, StreamedTape) else nullcontext():
                A, streamed = average_share(objective, self.params, make, self.share.parallel)
            return self._decayed(A), streamed
        tape, share = self.tape, self.share
        if curvature is not None:
            tape, share = record_share(curvature, self.params, self.share.parallel, for_curvature=True)
            self._settled.append(tape.buffers)
        assert isinstance(tape, Tape)  # for mypy: streamed is above
        return self._decayed(share.operator(make(tape))), tape

    def _decayed(self, A: LinearOperator) -> LinearOperator:
        """A + diag w."""
        if len(set(self.weight_decay)) == 1:
            return A + self.weight_decay[0] if self.weight_decay[0] else A
        if any(self.weight_decay):
            A = A + Diagonal([torch.full_like(p, w) for p, w in zip(self.params, self.weight_decay, strict=True)])
        return A

    def full_step(self, direction: Sequence[Tensor]) -> float:
        """F(θ + d), infinite where it is not finite."""
        value = self.evaluate(direction, 1.0)
        return value if math.isfinite(value) else math.inf

    def evaluate(self, direction: Sequence[Tensor], step_length: float) -> float:
        """F(θ + αd), infinite where the closure finds that it is not defined there (`UNDEFINED`)."""

        def value() -> float:
            try:
                return self.tape.evaluate()
            except UNDEFINED:
                return math.inf

        with self.share.moved(self.params, direction, step_length):
            return self.share.total(value) + self._penalty()

    @property
    def returned(self) -> Any:
        """What the closure returned, detached."""
        value = self.tape.returned
        return value.detach() if isinstance(value, Tensor) else value

    def outputs(self, direction: Sequence[Tensor], step_length: float) -> list[Tensor]:
        """The outputs z at θ + αd."""
        with self.share.moved(self.params, direction, step_length):
            return self.share.everywhere(self.recorded.evaluate_outputs)

    def pull_back(self, u: Sequence[Tensor]) -> Vector:
        """JᵀBu."""
        tape, total = self.recorded, vectors.zeros_like(self.recorded.params)
        for number, term in enumerate(tape.terms):
            vectors.add_(total, term.jacobian_adjoint(term.hessian_product(tape.of_term(u, number))))
        return self.share.reduced(total)

    def settle(self) -> None:
        """Buffers as the recorded run left them."""
        for snapshot in self._settled:
            snapshot.restore()

    def undo(self) -> None:
        """Buffers as they were before the recorded run."""
        self.settle()
        self.tape.buffers.restore()
