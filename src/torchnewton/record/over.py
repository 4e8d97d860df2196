"""`over`: an objective that is the mean over many batches, evaluated one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from torchnewton.record.replay import Closure

Weights = Sequence[float] | Callable[[Any], float]
Progress = Callable[[str, int, int | None], None]


class Objective:
    """What `over` makes."""

    def __init__(
        self,
        batches: Iterable[Any],
        loss_of_batch: Callable[[Any], Any] | None = None,
        *,
        weights: Weights | None = None,
        progress: Progress | None = None,
    ) -> None:
        if iter(batches) is batches:
            raise ValueError("batches is an iterator, which ends after one pass; give a list or a loader.")
        self.batches = batches
        self.loss_of_batch = loss_of_batch
        self.weights = weights if weights is None or callable(weights) else list(weights)
        self.progress = progress
        self.total_weight: float | None = None  # known after the first pass

    @property
    def num_batches(self) -> int | None:
        """How many there are, where they can tell."""
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return None

    @property
    def is_streamed(self) -> bool:
        """Whether no graph outlives its batch; a single batch is recorded like any closure."""
        return self.num_batches != 1

    def closures(self, stage: str) -> Iterator[tuple[Closure, float]]:
        """One pass: a closure for each batch, and its weight. `stage` says what the pass is for."""
        total = 0.0
        for number, (batch, weight) in enumerate(self._weighted(), start=1):
            total += weight
            yield batch if self.loss_of_batch is None else partial(self.loss_of_batch, batch), weight
            if self.progress is not None:
                self.progress(stage, number, self.num_batches)
        if not total > 0:
            raise ValueError(f"batches={self.batches!r}: there is no batch with a weight above 0.")
        self.total_weight = total

    def _weighted(self) -> Iterator[tuple[Any, float]]:
        given = iter(self.weights) if isinstance(self.weights, list) else None
        for batch in self.batches:
            if self.loss_of_batch is None and not callable(batch):
                raise ValueError(
                    f"batches holds a {type(batch).__name__}, which is no closure; say by loss_of_batch what its loss "
                    "is."
                )
            if given is not None:
                weight = next(given, None)
            elif callable(self.weights):
                weight = self.weights(batch)
            else:
                weight = 1 if self.loss_of_batch is None else _num_samples(batch)
            if weight is None or not 0 <= weight < math.inf:
                raise ValueError(f"weights={self.weights} must give a number of at least 0 to each batch.")
            yield batch, float(weight)
        if given is not None and next(given, None) is not None:
            raise ValueError(f"weights={self.weights} has more entries than there are batches.")

    def __call__(self) -> Any:
        """The mean loss as any closure gives it: with gradients enabled, the graphs of all batches are alive."""
        total = sum(weight * closure() for closure, weight in self.closures("loss"))
        return total / self.total_weight


def over(
    batches: Iterable[Any],
    loss_of_batch: Callable[[Any], Any] | None = None,
    *,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> Objective:
    """The objective f = Σᵢ wᵢfᵢ / Σᵢ wᵢ over the batches of a loader, for a step on more data than fit into memory.

        data = tn.over(loader, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        part = tn.over(loader_of_a_part, loss_of_batch)
        optimizer.step(data)                     # every evaluation within the step is a pass over the loader
        optimizer.step(data, curvature=part)     # gradient and line search on all, curvature from a part

    The batches are evaluated one after the other and no graph outlives its batch, so that the memory of a step is that
    of one batch, however many there are. An objective of a single batch is recorded like any closure: its graph stays
    for the whole step and products are cheaper.

    Args:
        batches: a list or a loader, iterated anew in each pass; one that shuffles is iterated from the same state of
            torch's generator, one that gives other batches in each pass is refused at the first step.
        loss_of_batch: the mean loss of a batch; without it the batches are closures themselves.
        weights: a list of numbers, or a function of a batch (of a closure, without `loss_of_batch`). By default the
            number of samples, which is the length of the first tensor of a batch, so that means over batches, the last
            one short, add up to the mean over the data; closures count alike.
        progress: called as `progress(stage, number, count)` after each batch, with the stage "gradient", "curvature"
            or "loss" and the number of batches, or None where the loader does not tell.

    Random numbers, as of dropout, repeat in every pass of a step. BatchNorm normalizes by batch, as in training, and
    its statistics move once for each batch of the gradient's pass. `param.grad` is left alone.

    Errors: `ValueError` for arguments.
    """
    return Objective(batches, loss_of_batch, weights=weights, progress=progress)


def _num_samples(batch: Any) -> int:
    """The length of the first tensor of a batch."""
    first = next(_tensors(batch), None)
    if first is None or first.dim() == 0:
        raise ValueError(
            f"a batch ({type(batch).__name__}) has no tensor that tells its number of samples; give weights=lambda "
            "batch: number of samples."
        )
    return len(first)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)
