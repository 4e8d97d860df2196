"""Calls of a closure that draws its own batch, checked; and a step that leaves no trace if it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchnewton import vectors
from torchnewton.optim.report import StepReport
from torchnewton.record import BufferSnapshot, Closure, eager_code, refuse_complex


class StepFailedError(Exception):
    """A numerical failure inside a step; its text becomes `report.status`."""


FAILURES = ("", "the gradient is not finite", "the loss is not finite")


class Calls:
    """The calls of a step's closure: each gives the gradients, None where a parameter was not used.

    `returned` is what the first call returned, and the report has its loss and gradient norm. `p.grad` is None before
    a call and holds the gradient after. Where several processes make the same step, `agreed` gives the largest of the
    codes of their failures, the places in `FAILURES`.
    """

    def __init__(
        self,
        closure: Closure,
        params: Sequence[Tensor],
        report: StepReport,
        agreed: Callable[[int], int] = lambda code: code,
    ) -> None:
        self.closure, self.params, self.report, self.agreed = closure, params, report, agreed
        self.returned: Any = None

    def __call__(self) -> list[Tensor | None]:
        """Run the closure.

        Raises:
            ValueError: if no parameter got a gradient: then the closure did not call `backward()`; or if it returned
                no number.
            StepFailedError: if loss or gradient is not finite.
        """
        for p in self.params:
            p.grad = None
        with torch.enable_grad():
            returned = self.closure()
        used = [p.grad for p in self.params if p.grad is not None]
        if not used:
            raise ValueError(
                "closure: no parameter has a gradient after it ran. It has to call loss.backward() before it returns "
                "the loss, on a loss that depends on the optimizer's parameters."
            )
        returned = returned.detach() if isinstance(returned, Tensor) else returned
        loss, size = _number(returned), vectors.norm(used)
        if not self.report.gradient_equivalents:
            self.returned, self.report.loss, self.report.gradient_norm = returned, loss, size
        self.report.gradient_equivalents += 1
        no_gradient = not math.isfinite(size) and not vectors.is_finite(used)
        code = self.agreed(2 if not math.isfinite(loss) else int(no_gradient))
        if code:
            raise StepFailedError(FAILURES[code])
        return [p.grad for p in self.params]


def _number(returned: Any) -> float:
    try:
        return float(returned)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"closure: it returned a {type(returned).__name__}, which is no number. It has to return the loss, as a "
            "scalar tensor or a float, after it has called loss.backward()."
        ) from error


def needed(closure: Closure | None, optimizer: Optimizer) -> Closure:
    """The closure.

    Raises:
        ValueError: if there is none.
    """
    if closure is None:
        raise ValueError(
            f"{type(optimizer).__name__}.step: closure=None; give one that calls backward() and returns the loss: "
            "optimizer.step(closure)."
        )
    return closure


def trainable(optimizer: Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Every parameter that requires a gradient, with its group.

    Raises:
        ValueError: if there is none.
        RecordError: if one is complex.
    """
    found = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not found:
        raise ValueError(f"{type(optimizer).__name__}.step: no parameter of the optimizer requires a gradient.")
    refuse_complex(p for p, _ in found)
    return found


@contextmanager
def all_or_nothing(params: Sequence[Tensor]) -> Iterator[BufferSnapshot]:
    """If an exception leaves the block, parameters and buffers of the modules called inside are put back.

    What `torch.compile` has made of them runs as the eager code it was made of, in which their calls can be seen.
    """
    start, buffers = vectors.clone(params), BufferSnapshot()
    try:
        with buffers.watch(), eager_code():
            yield buffers
    except BaseException:
        put(params, start)
        buffers.restore()
        raise


def put(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """θ ← values."""
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)


def check_ranges(name: str, **ranges: tuple[float, float, float]) -> None:
    """Each argument as (value, low, high) with low ≤ value < high.

    Raises:
        ValueError: naming the first that is outside.
    """
    for argument, (value, low, high) in ranges.items():
        if not low <= value < high:
            upper = "" if math.isinf(high) else f" and less than {high:g}"
            raise ValueError(f"{name}: {argument}={value} must be a finite number of at least {low:g}{upper}.")


def decayed(gradient: Tensor, x: Tensor, group: dict[str, Any]) -> Tensor:
    """∇f + wx."""
    return gradient.add(x, alpha=group["weight_decay"]) if group["weight_decay"] else gradient
