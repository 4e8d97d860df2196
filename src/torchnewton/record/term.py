"""One differentiated loss: its pieces ℓ(z), their output Hessians, and the kept linearization of z."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torchnewton.record.elementary import is_curved, is_linear
from torchnewton.record.errors import RecordError
from torchnewton.record.graph import (
    Edge,
    edge_of,
    filled,
    grad,
    inspected,
    reaches,
    refuse_once_differentiable,
    walk,
)
from torchnewton.record.known_values import KnownCall, at_known_values
from torchnewton.record.pieces import Candidate, pieces_of


class Row(NamedTuple):
    """Where a derivative by a parameter stands in the graph; its value is not kept alive."""

    edge: Edge
    dtype: torch.dtype


def _rows(found: Sequence[Tensor | None]) -> list[Row | None]:
    return [None if g is None or not g.requires_grad else Row(edge_of(g), g.dtype) for g in found]


def _detached(found: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else g.detach() for g in found]


class Term:
    """⟨weight, loss⟩, one summand of the objective: what one `backward` call differentiates.

    The pieces are the loss calls that the loss is made of, and then the marked outputs; `outputs` are their distinct z
    in that order. `gradient` is the term's gradient; `rest` says whether part of the loss reaches the parameters
    beside the pieces. Of Jᵀu as a function of the leaves `cotangents` u the graph is kept for products: J is its
    derivative.
    """

    def __init__(
        self,
        loss: Tensor,
        weight: Tensor,
        candidates: Sequence[Candidate],
        marked: Sequence[Candidate],
        params: Sequence[Tensor],
        create_graph: bool,
        known_calls: Sequence[KnownCall] = (),
    ) -> None:
        if not loss.requires_grad:
            raise RecordError("the loss does not depend on any parameter: compute it from the model with gradients on.")
        self.params = list(params)
        self._known_calls = list(known_calls)
        self.value = (loss.detach() * weight).sum()
        start = edge_of(loss)
        self._start, self._weight = start, weight.detach()
        self._custom, self.parameters = inspected(start)
        self.pieces, self.rest = pieces_of(loss, weight, candidates, marked, self.params)
        places = {edge: z for piece in self.pieces for edge, z in zip(piece.edges, piece.outputs, strict=True)}
        self.edges, self.outputs = list(places), list(places.values())
        self.cotangents = self._sum([piece.slope for piece in self.pieces])
        self._create_graph = create_graph
        self._rows: list[Row | None] | None = None
        self._gradient_rows: list[Row | None] | None = None
        _ = self.gradient  # now: the closure may read it next

    @cached_property
    def gradient(self) -> list[Tensor | None]:
        """∇⟨weight, loss⟩; None where a parameter is not used."""
        if self._create_graph and not self.pieces:
            return self._differentiated()
        if self.rest:
            return grad([self._start], self.params, [self._weight])
        if self._create_graph:
            return self._linearized()
        return grad(self.edges, self.params, self.cotangents)

    @cached_property
    def lacks_curvature(self) -> bool:
        """Whether a part of the loss beside the pieces is more than linear in what it is made of."""
        if not self.rest or any(reaches([p.loss_edge], self.params, set(p.edges)) for p in self.pieces):
            return self.rest
        border = {p.loss_edge for p in self.pieces} | {edge for p in self.pieces for edge in p.edges}
        ends = walk([self._start], border, lambda node: is_linear(node, self.params))
        return any(edge not in border and is_curved(edge[0]) and not is_linear(edge[0], self.params) for edge in ends)

    def forget_gradient(self) -> None:
        """Give its memory back; whoever asks for it pays for another backward pass."""
        self.__dict__.pop("gradient", None)

    def _sum(self, parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """Per output, the sum of what the pieces give for theirs."""
        total = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in self.outputs]
        position = {edge: i for i, edge in enumerate(self.edges)}
        for piece, part in zip(self.pieces, parts, strict=True):
            for edge, value in zip(piece.edges, part, strict=True):
                if value is not None:
                    total[position[edge]] += value.detach()
        return total

    def _linearized(self) -> list[Tensor | None]:
        """Jᵀu with its graph in u, of which only the places are kept."""
        self.cotangents = [u.detach().requires_grad_() for u in self.cotangents]
        with at_known_values(self._known_calls):
            found = grad(self.edges, self.params, self.cotangents, create_graph=True)
        if self._custom:
            refuse_once_differentiable(g for g in found if g is not None)
        self._rows = _rows(found)
        return _detached(found)

    def _differentiated(self) -> list[Tensor | None]:
        """The gradient with its graph in the parameters, of which only the places are kept."""
        weight = self._weight.clone().requires_grad_() if self._custom else self._weight  # shows once_differentiable
        found = grad([self._start], self.params, [weight], create_graph=True)
        if self._custom:
            refuse_once_differentiable(g for g in found if g is not None)
        self._gradient_rows = _rows(found)
        return _detached(found)

    def gradient_product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """∂⟨g, v⟩/∂θ with g the gradient: the Hessian of the whole term times v. One backward pass more at first."""
        if self._gradient_rows is None:
            self._differentiated()
        assert self._gradient_rows is not None
        pairs = [(row, w) for row, w in zip(self._gradient_rows, v, strict=True) if row is not None]
        found = grad([row.edge for row, _ in pairs], self.params, [w.to(row.dtype) for row, w in pairs])
        return filled(found, self.params)

    def jacobian_product(self, v: Sequence[Tensor | None]) -> list[Tensor]:
        """Jv, one tensor per output; None stands for zeros. One backward pass more at first."""
        if all(w is None for w in v):
            return filled([None] * len(self.outputs), self.outputs)
        if self._rows is None:
            self._linearized()
        assert self._rows is not None
        pairs = [(row, w) for row, w in zip(self._rows, v, strict=True) if w is not None and row is not None]
        found = grad([row.edge for row, _ in pairs], self.cotangents, [w.to(row.dtype) for row, w in pairs])
        return filled(found, self.outputs)

    def jacobian_adjoint(self, u: Sequence[Tensor], wanted: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Jᵀu, one tensor per parameter; zeros where `wanted`, if given, has None."""
        if wanted is None:
            return filled(grad(self.edges, self.params, u), self.params)
        chosen = [i for i, w in enumerate(wanted) if w is not None]
        found: list[Tensor | None] = [None] * len(self.params)
        for i, g in zip(chosen, grad(self.edges, [self.params[i] for i in chosen], u), strict=True):
            found[i] = g
        return filled(found, self.params)

    def hessian_product(self, u: Sequence[Tensor]) -> list[Tensor]:
        """Bu with B = ∂²f/∂z², the sum over the pieces of weight · ∂²ℓ/∂z²."""
        position = {edge: i for i, edge in enumerate(self.edges)}
        parts = []
        for piece in self.pieces:
            pairs = [(s, u[position[e]]) for s, e in zip(piece.slope, piece.edges, strict=True) if s.requires_grad]
            parts.append(grad([edge_of(s) for s, _ in pairs], piece.edges, [w for _, w in pairs]))
        return self._sum(parts)


def warn_about_rest() -> None:
    """Say that part of the loss has no curvature in the Gauss-Newton matrix."""
    warnings.warn(
        "part of the loss reaches the parameters beside the recorded outputs: it counts in the gradient, but not in "
        "the Gauss-Newton matrix. For an L2 penalty use weight_decay=; for another loss mark its outputs with "
        "tn.outputs(z).",
        stacklevel=2,
    )
