"""One differentiated loss: its pieces ℓ(z), their output Hessians, and the kept linearization of z."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torchnewton.record.errors import RecordError

_NO_SECOND_DERIVATIVE = ("derivative for", "double backward", "does not support", "not implemented", "once_differentiable")


@dataclass(frozen=True)
class Candidate:
    """A loss call seen while recording: ℓ = name(z₁, …)."""

    name: str
    outputs: list[Tensor]
    loss: Tensor


@dataclass(frozen=True)
class Piece:
    """A part ⟨weight, ℓ(z)⟩ of a term: `weight` = ∂f/∂ℓ, in the shape of ℓ; `slope` = weight · ∂ℓ/∂z with its graph."""

    name: str
    outputs: list[Tensor]
    loss: Tensor
    weight: Tensor
    slope: list[Tensor]


@contextmanager
def explained_errors() -> Iterator[None]:
    """Turn autograd's errors about what it cannot differentiate into the way out."""
    try:
        yield
    except RecordError:
        raise
    except RuntimeError as error:
        message = str(error)
        if "use_reentrant" in message or "incompatible with .grad()" in message:
            raise RecordError(
                "reentrant checkpointing cannot be differentiated twice: call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            ) from error
        if "backward through the graph a second time" in message:
            raise RecordError(
                "part of the closure's graph was freed, by a backward pass outside of the recording or by a tensor "
                "kept from an earlier step: compute the loss anew in each call and detach what is carried over."
            ) from error
        if any(phrase in message for phrase in _NO_SECOND_DERIVATIVE):
            raise RecordError(
                f"an operation of the closure cannot be differentiated twice: {message.splitlines()[0]} "
                "Replace it by a differentiable one, or keep its parameters out of the optimizer."
            ) from error
        raise


class Term:
    """⟨weight, loss⟩, one summand of the objective: what one `backward` call differentiates.

    The pieces are the loss calls (or the marked outputs) that the loss is made of; `outputs` are their distinct z.
    `gradient` is the term's gradient; `rest` says whether part of the loss reaches the parameters beside the outputs.
    `linearization` is Jᵀu as a function of the leaves `cotangents` u, kept for products: J is its derivative.
    """

    def __init__(
        self,
        loss: Tensor,
        weight: Tensor,
        candidates: Sequence[Candidate],
        marked: Sequence[Tensor],
        params: Sequence[Tensor],
        create_graph: bool,
    ) -> None:
        self.params = list(params)
        self.value = (loss.detach() * weight).sum()
        if not loss.requires_grad:
            raise RecordError("the loss does not depend on any parameter: compute it from the model with gradients on.")
        with explained_errors():
            self.pieces = _pieces(loss, weight, candidates, marked)
            self.outputs = _distinct([z for piece in self.pieces for z in piece.outputs])
            self.cotangents = self._sum_slopes([piece.slope for piece in self.pieces])
            self.rest = not self.outputs or _reaches(loss, self.outputs, self.params)
            self._linearization: list[Tensor | None] | None = None
            if self.rest:
                self.gradient = _grad([loss], self.params, [weight], create_graph=not self.outputs and create_graph)
            elif create_graph:
                self.gradient = self.linearization
            else:
                self.gradient = _grad(self.outputs, self.params, self.cotangents)

    def _sum_slopes(self, slopes: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        total = [torch.zeros_like(z) for z in self.outputs]
        position = {id(z): i for i, z in enumerate(self.outputs)}
        for piece, slope in zip(self.pieces, slopes, strict=True):
            for z, s in zip(piece.outputs, slope, strict=True):
                total[position[id(z)]] += s.detach()
        return total

    @property
    def linearization(self) -> list[Tensor | None]:
        """Jᵀu with its graph in u; one backward pass when it is first asked for."""
        if self._linearization is None:
            self.cotangents = [u.detach().requires_grad_() for u in self.cotangents]
            with explained_errors():
                self._linearization = _grad(self.outputs, self.params, self.cotangents, create_graph=True)
        return self._linearization

    def jacobian_product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Jv, one tensor per output."""
        pairs = [(g, w) for g, w in zip(self.linearization, v, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(z) for z in self.outputs]
        with explained_errors():
            found = _grad([g for g, _ in pairs], self.cotangents, [w.to(g.dtype) for g, w in pairs])
        return _filled(found, self.outputs)

    def jacobian_adjoint(self, u: Sequence[Tensor]) -> list[Tensor]:
        """Jᵀu, one tensor per parameter."""
        with explained_errors():
            return _filled(_grad(self.outputs, self.params, u), self.params)

    def hessian_product(self, u: Sequence[Tensor]) -> list[Tensor]:
        """Bu with B = ∂²f/∂z², the sum over the pieces of weight · ∂²ℓ/∂z²."""
        total = [torch.zeros_like(z) for z in self.outputs]
        position = {id(z): i for i, z in enumerate(self.outputs)}
        for piece in self.pieces:
            places = [position[id(z)] for z in piece.outputs]
            curved = [(s, u[i]) for s, i in zip(piece.slope, places, strict=True) if s.requires_grad]
            if not curved:
                continue
            with explained_errors():
                found = _grad([s for s, _ in curved], piece.outputs, [w for _, w in curved])
            for i, b in zip(places, found, strict=True):
                if b is not None:
                    total[i] += b
        return total


def _grad(
    of: Sequence[Tensor], wrt: Sequence[Tensor], weights: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """`torch.autograd.grad` that keeps the graph and gives None for what does not matter."""
    return list(
        torch.autograd.grad(of, wrt, weights, retain_graph=True, create_graph=create_graph, allow_unused=True)
    )


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, like, strict=True)]


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _pieces(
    loss: Tensor, weight: Tensor, candidates: Sequence[Candidate], marked: Sequence[Tensor]
) -> list[Piece]:
    """The candidates that `loss` is made of; a marked tensor replaces those it feeds."""
    marks = _connected(loss, weight, _distinct([z for z in marked if z.requires_grad]))
    if marks:
        edges = {_edge(z) for z in marks}
        candidates = [c for c in candidates if not any(_depends_on(z, edges) for z in c.outputs)]
    found = _grad([loss], [c.loss for c in candidates], [weight]) if candidates else []
    chosen = [(c, w) for c, w in zip(candidates, found, strict=True) if w is not None]
    if marks:
        chosen.append((Candidate("outputs", marks, loss), weight))
    pieces = []
    for candidate, w in chosen:
        slope = _grad([candidate.loss], candidate.outputs, [w.detach()], create_graph=True)
        pieces.append(Piece(candidate.name, candidate.outputs, candidate.loss, w.detach(), _filled(slope, candidate.outputs)))
    return pieces


def _connected(loss: Tensor, weight: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    if not tensors:
        return []
    return [z for z, g in zip(tensors, _grad([loss], tensors, [weight]), strict=True) if g is not None]


def _edge(tensor: Tensor) -> tuple[Node, int]:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _walk(start: Tensor, stop: set[tuple[Node, int]]) -> Iterator[tuple[Node, int]]:
    """Every edge of the graph behind `start`, not going behind the edges in `stop`."""
    stack = [_edge(start)]
    seen = set(stack)
    while stack:
        current = stack.pop()
        yield current
        if current in stop:
            continue
        for node, number in current[0].next_functions:
            if node is not None and (node, number) not in seen:
                seen.add((node, number))
                stack.append((node, number))


def _depends_on(z: Tensor, edges: set[tuple[Node, int]]) -> bool:
    return any(edge in edges for edge in _walk(z, edges))


def _reaches(loss: Tensor, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether `loss` depends on a parameter other than through the outputs."""
    stop = {_edge(z) for z in outputs}
    leaves = {id(p) for p in params}
    for edge in _walk(loss, stop):
        if edge not in stop and id(getattr(edge[0], "variable", None)) in leaves:
            return True
    return False


def warn_about_rest() -> None:
    """Say that part of the loss has no curvature in the Gauss-Newton matrix."""
    warnings.warn(
        "part of the loss reaches the parameters beside the recorded outputs: it counts in the gradient, but not in the "
        "Gauss-Newton matrix. For an L2 penalty use weight_decay=; for another loss mark its outputs with tn.outputs(z).",
        stacklevel=3,
    )
