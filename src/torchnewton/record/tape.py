"""`record`: one run of an unchanged closure gives a tape."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchnewton.record.call import LayerCall
from torchnewton.record.errors import RecordError, refuse_complex
from torchnewton.record.graph import Edge
from torchnewton.record.pieces import Piece
from torchnewton.record.recorder import OutputsWatcher, Place, Recorder, Watcher
from torchnewton.record.replay import (
    BufferSnapshot,
    Closure,
    RandomState,
    differentiable_kernels,
    kept_gradients,
    refuse_grad_scaler,
    same_random_numbers,
    scratch_buffers,
    without_graph,
)
from torchnewton.record.samples import NotPerSampleError, PerSample
from torchnewton.record.term import Term


@dataclass(frozen=True, eq=False)
class Tape:
    """What one run of a closure leaves: the loss, its gradient, and where the loss splits into ℓ(z).

    The objective is a sum of `terms`, one for each `backward` call of the closure, or the returned loss alone. The
    tape keeps the graph alive: drop it when the step is done. `others` are parameters beside `params` whose gradients
    a `backward` call of the closure has filled. `differentiates` says that the closure takes derivatives itself, as of
    a physics-informed network by its points, `differentiates_parameters` that it takes some by parameters.
    """

    closure: Closure
    params: list[Tensor]
    terms: list[Term]
    layer_calls: list[LayerCall]
    sizes: dict[Edge, torch.Size]
    places: dict[Edge, Place]
    returned: Any
    random_state: RandomState | None
    buffers: BufferSnapshot
    differentiates_parameters: bool
    others: list[Tensor]
    differentiates: bool = False

    @cached_property
    def loss(self) -> Tensor:
        """f as a detached scalar."""
        return torch.stack([term.value for term in self.terms]).sum()

    @cached_property
    def gradient(self) -> list[Tensor]:
        """∇f, detached, zeros for unused parameters."""
        total = []
        for p, *parts in zip(self.params, *(term.gradient for term in self.terms), strict=True):
            found = [g.detach() for g in parts if g is not None]
            total.append(sum(found[1:], found[0]) if found else torch.zeros_like(p))
        return total

    @cached_property
    def descent(self) -> list[Tensor]:
        """−∇f."""
        return [-g for g in self.gradient]

    def forget_gradient(self) -> None:
        """Give its memory back; whoever asks for it pays for another backward pass."""
        for name in ("gradient", "descent"):
            self.__dict__.pop(name, None)
        for term in self.terms:
            term.forget_gradient()

    @property
    def pieces(self) -> list[Piece]:
        """The losses ℓ(z) with their weights ∂f/∂ℓ."""
        return [piece for term in self.terms for piece in term.pieces]

    @property
    def outputs(self) -> list[Tensor]:
        """The tensors z, in the order of the terms."""
        return [z for term in self.terms for z in term.outputs]

    def of_term(self, u: Sequence[Tensor], number: int) -> list[Tensor]:
        """Those of `u`, a list like the outputs, that belong to one term."""
        start = sum(len(term.outputs) for term in self.terms[:number])
        return list(u[start : start + len(self.terms[number].outputs)])

    @property
    def forward_flops(self) -> float:
        """Operations of the matrix products in a forward pass, by the calls that use parameters: see `record.flops`."""
        return sum(call.flops for call in self.layer_calls)

    @property
    def has_rest(self) -> bool:
        """Whether part of the loss reaches the parameters beside the outputs."""
        return any(term.rest for term in self.terms)

    @property
    def lacks_curvature(self) -> bool:
        """Whether a part of the loss beside the outputs has curvature that a Gauss-Newton matrix does not know."""
        return any(term.lacks_curvature for term in self.terms)

    def require_split(self) -> None:
        """Raise `RecordError` unless every term has outputs."""
        if not all(term.outputs for term in self.terms):
            raise RecordError(
                "no split of the loss into outputs and a convex loss was found, which a Gauss-Newton matrix needs. "
                "Either compute the loss with a loss of torch.nn.functional (cross_entropy, mse_loss, "
                "binary_cross_entropy_with_logits, huber_loss, nll_loss after log_softmax, …) or as a sum of squares, "
                "norms or log-probabilities, or mark the network's outputs: loss = my_loss(tn.outputs(model(x)), y). "
                "Where a target is computed from the output that is compared with it, take the square of their "
                "difference."
            )

    def evaluate(self) -> float:
        """f at the parameters' present values, on the same random numbers, leaving no trace."""
        watcher = Watcher()
        return _value(watcher, self._replay(watcher))

    def evaluate_outputs(self) -> list[Tensor]:
        """The outputs z at the parameters' present values, likewise."""
        edges = [edge for term in self.terms for edge in term.edges]
        watcher = OutputsWatcher(self.places[edge] for edge in edges)
        self._replay(watcher)
        return self._at_places(watcher.found)

    def per_sample(self) -> tuple[list[Tensor], PerSample]:
        """The outputs once more, and the replay that takes them apart into samples.

        Raises `NotPerSampleError` where a call cannot be taken apart. Whether the samples are independent is for the
        caller to check.
        """
        replay = PerSample(self.params)
        try:
            self._replay(replay)
            return self._counterparts(replay), replay
        except Exception as error:  # of any kind: vmap shows functions shapes that they may not expect
            raise NotPerSampleError(str(error).split("\n")[0]) from error

    def _counterparts(self, replay: PerSample) -> list[Tensor]:
        """The tensors of a replay that stand where the outputs stood in the recorded run."""
        again = {
            replay.places[edge]: z
            for c in replay.candidates + replay.marked
            for edge, z in zip(c.edges, c.outputs, strict=True)
        }
        return self._at_places(again)

    def _at_places(self, found: Mapping[Place, Tensor]) -> list[Tensor]:
        """The outputs of another run, by what it found where."""
        try:
            return [found[self.places[edge]] for term in self.terms for edge in term.edges]
        except KeyError as error:
            raise RecordError("the losses of the closure differ from those of its recorded run") from error

    def _replay(self, watcher: Watcher) -> Any:
        watcher.pretend(self.params, self.__dict__.get("gradient"))
        with (
            same_random_numbers(self.random_state, [p.device for p in self.params]),
            kept_gradients(self.others),
            scratch_buffers(self.buffers),
        ):
            return _replayed(watcher, self.closure, self.params, self.differentiates_parameters)


def _replayed(watcher: Watcher, closure: Closure, params: Sequence[Tensor], differentiates_parameters: bool) -> Any:
    """Run the closure under `watcher`; gradients are put back."""
    still = kept_gradients if differentiates_parameters else without_graph
    with (
        warnings.catch_warnings(),
        torch.enable_grad(),
        still(params),
        differentiable_kernels(),
        watcher,
    ):
        warnings.simplefilter("ignore")  # the recorded run has shown them
        return closure()


def _value(watcher: Watcher, returned: Any) -> float:
    """The objective of a run."""
    if watcher.backward_values:
        return float(torch.stack(watcher.backward_values).sum())
    return float(returned.detach() if isinstance(returned, Tensor) else returned)


def evaluated(closure: Closure, params: Sequence[Tensor], differentiates_parameters: bool) -> float:
    """The objective of a closure on new random numbers; its buffers move, and there is no other trace."""
    watcher = Watcher()
    watcher.pretend(params, None)
    return _value(watcher, _replayed(watcher, closure, params, differentiates_parameters))


def record(closure: Closure, params: Sequence[Tensor], *, create_graph: bool = True) -> Tape:
    """Run `closure` once, unchanged, and keep what Newton-type methods need.

    The closure returns the scalar loss f. It may call `zero_grad()` and `backward()`; then `param.grad` is filled as
    `backward` would, and several `backward` calls add up to the objective. The objective is one of `params`; each
    other `nn.Parameter` in the graph gets its gradient from `backward`, no more, which costs another backward pass: set
    `requires_grad_(False)` for those that nobody trains.

    With `create_graph` the backward pass keeps its own graph, so that the first curvature product costs no more than
    the others; without it the first product pays for one more backward pass.

    Cost: one gradient. Memory: the graph of the loss, with `create_graph` about twice that.

    Raises `RecordError` with the way out when the closure cannot be recorded, and lets the closure's own exceptions
    pass. A loss without a split is recorded: only a Gauss-Newton matrix of it raises.
    """
    params = list(params)
    refuse_complex(params)
    recorder = Recorder(params, create_graph)
    buffers = BufferSnapshot()
    random_state = RandomState([p.device for p in params])
    try:
        with torch.enable_grad(), buffers.watch(), differentiable_kernels(), refuse_grad_scaler():
            with recorder:
                returned = closure()
            if not recorder.terms:
                loss = _scalar(returned)
                recorder.add_term(loss, torch.ones_like(loss))
    except BaseException:
        buffers.restore()
        raise
    return Tape(
        closure=closure,
        params=params,
        terms=recorder.terms,
        layer_calls=recorder.layer_calls,
        sizes=recorder.sizes,
        places=recorder.places,
        returned=returned,
        random_state=None if random_state.is_current() else random_state,
        buffers=buffers,
        differentiates_parameters=recorder.differentiates_parameters,
        others=recorder.others,
        differentiates=recorder.differentiates,
    )


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RecordError(
            f"the closure returned {kind}: return the scalar loss, computed from the parameters (loss, not "
            "loss.item(), unless the closure calls loss.backward() itself)."
        )
    return value
