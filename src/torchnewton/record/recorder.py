"""The mode that watches a closure run: loss calls, backward calls, and calls that use a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from torchnewton.record.batch_norm import BatchNormCall
from torchnewton.record.call import LayerCall, tensors_in
from torchnewton.record.convolution import CONVOLUTIONS, ConvolutionCall
from torchnewton.record.elementary import ELEMENTARY, NORMS, Elementary, is_complement
from torchnewton.record.errors import RecordError
from torchnewton.record.flops import is_product
from torchnewton.record.graph import Edge, edge_of, grad
from torchnewton.record.known_values import KnownCall
from torchnewton.record.linear import LinearCall
from torchnewton.record.losses import (
    ACTIVATIONS,
    LOSSES,
    SIGMOID,
    Function,
    divisor,
    is_guard,
    num_samples,
    reduction,
    split_inputs,
)
from torchnewton.record.normalization import LayerNormCall
from torchnewton.record.pieces import Candidate
from torchnewton.record.term import Term

_BACKWARD = {Tensor.backward, torch.autograd.backward}
_IS_LIVE, _GRADIENT = (getattr(Tensor, name).__get__ for name in ("requires_grad", "grad"))
_EMBEDDINGS = {F.embedding, F.embedding_bag}
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_KNOWN: Mapping[Function, type[BatchNormCall | ConvolutionCall | LayerNormCall | LinearCall]] = {
    F.batch_norm: BatchNormCall,
    F.layer_norm: LayerNormCall,
    F.linear: LinearCall,
    **dict.fromkeys(CONVOLUTIONS, ConvolutionCall),
}


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v/‖v‖. torch's own function takes ‖v‖ for a constant in its second derivative."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_CORRECTED: Mapping[Function, Function] = {torch._weight_norm: _weight_norm}


def outputs(z: Tensor) -> Tensor:
    """Mark the network outputs z of a custom convex loss and return them unchanged.

        loss = my_loss(tn.outputs(model(x)), y)

    Everything between z and the loss counts as ℓ(z); the Gauss-Newton matrix is JᵀBJ with J = ∂z/∂θ and B = ∂²ℓ/∂z².
    A torch loss that is called on marked outputs is part of that ℓ. Outside of a recording nothing happens.
    """
    if has_torch_function_unary(z):
        marked: Tensor = handle_torch_function(outputs, (z,), z)
        return marked
    return z


_NUMBERED = {*LOSSES, *ACTIVATIONS, *ELEMENTARY, outputs}
Place = tuple[int, int]  # of a tensor: the number of a loss or activation call, and which of its tensors


class Watcher(TorchFunctionMode):
    """Intercepts what every run of a closure needs: `backward` calls become terms of the objective, nothing more."""

    def __init__(self) -> None:
        super().__init__()
        self.backward_values: list[Tensor] = []
        self._shown: dict[int, Tensor | None] = {}
        self._number = 0  # of the next call that may be a loss or stand in front of one

    def pretend(self, params: Sequence[Tensor], gradient: Sequence[Tensor] | None) -> None:
        """Let a closure that asks see live parameters, and `gradient` (else zeros) after it has called `backward`.

        For runs in which the parameters are constants and nothing is differentiated.
        """
        found = [None] * len(params) if gradient is None else gradient
        self._shown = {id(p): g for p, g in zip(params, found, strict=True) if p.requires_grad}

    def _pretended(self, func: Function, p: Tensor) -> Any:
        if func == _IS_LIVE:
            return True
        if p.grad is None and self.backward_values:
            known = self._shown[id(p)]
            p.grad = torch.zeros_like(p) if known is None else known.detach().clone()
        return p.grad

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        func = _CORRECTED.get(func, func)
        if func in _BACKWARD:
            for loss, weight in _backward_arguments(func, args, kwargs):
                self.backward_values.append((loss.detach() * weight).sum())
                self.on_backward(loss, weight)
            return None
        if func in (_IS_LIVE, _GRADIENT) and id(args[0]) in self._shown:
            return self._pretended(func, args[0])
        if func in _NUMBERED:
            for k, tensor in enumerate([*tensors_in(args), *tensors_in(kwargs)]):
                self.on_place((self._number, k), tensor)
            self._number += 1
        if func in _RECURRENT:  # cuDNN's recurrent kernels have no second derivative
            with torch.backends.cudnn.flags(enabled=False):
                return self.on_call(func, args, kwargs)
        return self.on_call(func, args, kwargs)

    def on_backward(self, loss: Tensor, weight: Tensor) -> None:
        """A `backward` call was made."""

    def on_place(self, place: Place, tensor: Tensor) -> None:
        """A tensor goes into a loss or into what may stand in front of one; the same place in every run."""

    def on_call(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Any other call was made: run it."""
        return args[0] if func is outputs else func(*args, **kwargs)


class OutputsWatcher(Watcher):
    """A later run of a closure that keeps the tensors at the given places and no graph."""

    def __init__(self, places: Iterable[Place]) -> None:
        super().__init__()
        self.found: dict[Place, Tensor] = {}
        self._wanted = set(places)

    def on_place(self, place: Place, tensor: Tensor) -> None:
        """Keep a copy, since the closure may go on in place."""
        if place in self._wanted:
            self.found[place] = tensor.detach().clone()


class Recorder(Watcher):
    """Keeps what the tape needs from the first run of a closure."""

    def __init__(self, params: Sequence[Tensor], create_graph: bool) -> None:
        super().__init__()
        self.params = list(params)
        self.create_graph = create_graph
        self.candidates: list[Candidate] = []
        self.marked: list[Candidate] = []
        self.layer_calls: list[LayerCall] = []
        self.known_calls: list[KnownCall] = []
        self.sizes: dict[Edge, torch.Size] = {}
        self.terms: list[Term] = []
        self.others: list[Tensor] = []
        self.differentiates = self.differentiates_parameters = False
        self.places: dict[Edge, Place] = {}
        self._ids = {id(p) for p in params}
        self._made: dict[int, Tensor] = {}  # of parameters alone
        self._seen: dict[int, Place] = {}
        self._activations: dict[Node, tuple[Function, Tensor]] = {}

    def on_backward(self, loss: Tensor, weight: Tensor) -> None:
        """Differentiate at once, since the closure may read `param.grad` next.

        Other parameters, as of another optimizer, get their gradients as from `backward`, too.
        """
        term = self.add_term(loss, weight)
        others = [p for p in term.parameters if id(p) not in self._ids]
        known = {id(p) for p in self.others}
        self.others += [p for p in others if id(p) not in known]
        gradient = [*term.gradient, *grad([edge_of(loss)], others, [weight])]
        for p, g in zip([*self.params, *others], gradient, strict=True):
            if g is not None:
                p.grad = g.detach().clone() if p.grad is None else p.grad + g.detach()

    def add_term(self, loss: Tensor, weight: Tensor) -> Term:
        """Add ⟨weight, loss⟩ to the objective."""
        term = Term(loss, weight, self.candidates, self.marked, self.params, self.create_graph, self.known_calls)
        self.terms.append(term)
        return term

    def on_place(self, place: Place, tensor: Tensor) -> None:
        """Remember it."""
        self._seen[id(tensor)] = place

    def on_call(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the call and keep it if it is a loss, an activation in front of one, or uses a parameter."""
        if func is torch.autograd.grad:
            self.differentiates = True
            self.differentiates_parameters |= self._uses_parameter(args[1:2], kwargs)
        elif func in _EMBEDDINGS and kwargs.get("sparse", len(args) > 6 and args[6]):
            raise RecordError(
                "an embedding with sparse=True gives sparse gradients, which have no curvature products: build it "
                "with sparse=False."
            )
        result = super().on_call(func, args, kwargs)
        output = result if isinstance(result, Tensor) else next(tensors_in([result]), None)
        if output is not None and output.grad_fn is not None:
            self.sizes[edge_of(output)] = output.shape
            if (known := _known_call(func, args, kwargs, output)) is not None:
                self.known_calls.append(known)
            self._keep(func, args, kwargs, output)
        return result

    def _keep(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        if func is outputs:
            self._place(Candidate.of("outputs", [output], output), self.marked)
        elif func in LOSSES:
            inputs = split_inputs(LOSSES[func], args, kwargs, self._activations)
            if inputs:
                candidate = Candidate.of(
                    func.__name__,
                    inputs,
                    output,
                    divisor=partial(divisor, func, args, kwargs),
                    reduction=partial(reduction, func, args, kwargs),
                    num_samples=partial(num_samples, func, args, kwargs),
                )
                self._place(candidate, self.candidates)
            return
        if func not in ACTIVATIONS and (self._uses_parameter(args, kwargs) or (self._made and is_product(func))):
            self._keep_layer(func, args, kwargs, output)
        self._keep_elementary(func, args, kwargs, output)

    def _keep_elementary(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """What may be a part of a loss that is written by hand, and what stands in front of one."""
        activations, node = self._activations, output.grad_fn
        if node is None:
            return
        if func in ACTIVATIONS or func in NORMS:
            activations[node] = (func, args[0] if args else kwargs["input"])
        elif is_guard(func, args) or is_complement(func, args):
            behind = activations.get(args[0].grad_fn)
            if behind is not None and (behind[0] in SIGMOID or is_guard(func, args)):
                activations[node] = behind
        found = Elementary.of(func, args, kwargs, output, activations)
        if found is not None:
            is_penalty = id(found.z) in self._ids or id(found.z) in self._made
            candidate = Candidate.of(
                func.__name__, [found.z], output, num_samples=found.num_samples, form=found, is_penalty=is_penalty
            )
            self._place(candidate, self.candidates)

    def _keep_layer(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        tensors = (*tensors_in(args), *tensors_in(kwargs))
        used = tuple(t for t in tensors if id(t) in self._ids)
        known = [id(t) in self._ids or id(t) in self._made for t in tensors]
        if all(known):
            self._made[id(output)] = output
        if any(known):
            exact = not torch.is_autocast_enabled(output.device.type)
            call = LayerCall(func, args, kwargs, tensors, used, edge_of(output), output.shape, exact)
            self.layer_calls.append(call)

    def _place(self, candidate: Candidate, kept: list[Candidate]) -> None:
        kept.append(candidate)
        for edge, z in zip(candidate.edges, candidate.outputs, strict=True):
            self.places[edge] = self._seen[id(z)]

    def _uses_parameter(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        ids = self._ids
        return any(id(t) in ids for t in tensors_in(args)) or any(id(t) in ids for t in tensors_in(kwargs))


def _known_call(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> KnownCall | None:
    """The call as one that Jᵀu takes at known values, where it is of such a kind."""
    kind = _KNOWN.get(func)
    return None if kind is None else kind.of(args, kwargs, output)


def _backward_arguments(
    func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The losses of a `Tensor.backward` or `torch.autograd.backward` call with their weights."""
    if kwargs.get("inputs") is not None:
        raise RecordError(
            "backward(inputs=...) inside the closure is not supported: call loss.backward(), the optimizer "
            "differentiates with respect to its own parameters only."
        )
    names = ("gradient",) if func is Tensor.backward else ("grad_tensors", "grad_variables")
    losses = args[0] if args else kwargs.get("tensors", kwargs.get("self"))
    weights = args[1] if len(args) > 1 else next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
    losses = [losses] if isinstance(losses, Tensor) else list(losses)
    weights = [weights] * len(losses) if weights is None or isinstance(weights, Tensor) else list(weights)
    for loss, weight in zip(losses, weights, strict=True):
        if weight is None and loss.numel() != 1:
            raise RecordError(
                f"backward() was called on a tensor of shape {tuple(loss.shape)}: reduce it to a scalar loss."
            )
        yield loss, torch.ones_like(loss) if weight is None else weight
