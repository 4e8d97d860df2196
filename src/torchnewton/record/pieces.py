"""Where a loss splits: the loss calls and elementary functions ℓ(z) that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchnewton.record.elementary import Elementary, is_passed
from torchnewton.record.errors import RecordError
from torchnewton.record.graph import Edge, edge_of, filled, grad, reaches, walk


@dataclass(frozen=True)
class Candidate:
    """A loss call seen while recording: ℓ = name(z₁, …), with its place in the graph at that time.

    `divisor()` is D with ℓ = Σ/D, Σ the sum over the entries (see `losses.divisor`), `reduction()` how it is made,
    `num_samples()` of how many samples; None where that is not known.

    A call of an elementary function, `form` says of which kind, is a loss only where the loss is a sum of such; ℓ is
    `sign` times what the call gives. `is_penalty` says that it is one of parameters alone.
    """

    name: str
    outputs: list[Tensor]
    edges: list[Edge]
    loss_edge: Edge
    divisor: Callable[[], float] | None = None
    reduction: Callable[[], str] | None = None
    num_samples: Callable[[], float] | None = None
    form: Elementary | None = None
    is_penalty: bool = False

    @property
    def sign(self) -> float:
        """ℓ by what the call gives."""
        return 1.0 if self.form is None else self.form.sign

    @classmethod
    def of(cls, name: str, outputs: Sequence[Tensor], loss: Tensor, **more: Any) -> Candidate:
        """The candidate as it stands in the graph now."""
        return cls(name, list(outputs), [edge_of(z) for z in outputs], edge_of(loss), **more)


@dataclass(frozen=True, kw_only=True)
class Piece(Candidate):
    """A part ⟨weight, ℓ(z)⟩ of a term: `weight` = ∂f/∂ℓ, in the shape of ℓ; `slope` = weight · ∂ℓ/∂z with its graph.

    A norm ℓ = ‖z‖ has no curvature along z. In its place stands the parabola that touches it and is nowhere below,
    (‖z‖²/‖z₀‖ + ‖z₀‖)/2: the slope z/‖z₀‖ with ‖z₀‖ held (iteratively reweighted least squares).
    """

    weight: Tensor
    slope: list[Tensor]

    @classmethod
    def weighted(cls, c: Candidate, weight: Tensor) -> Piece:
        """From the derivative of f by what the call gave."""
        w = weight.detach()
        slope = filled(grad([c.loss_edge], c.edges, [w], create_graph=True), c.outputs)
        if c.form is not None and c.form.is_norm:
            slope = [z * torch.where(z == 0, 0.0, s / z).detach() for s, z in zip(slope, c.outputs, strict=True)]
        return cls(**vars(c), weight=c.sign * w, slope=slope)

    def slope_for(self, weight: Tensor) -> list[Tensor]:
        """weight · ∂ℓ/∂z for another weight, without its graph."""
        return filled(grad([self.loss_edge], self.edges, [self.sign * weight]), self.outputs)


def pieces_of(
    loss: Tensor,
    weight: Tensor,
    candidates: Sequence[Candidate],
    marked: Sequence[Candidate],
    params: Sequence[Tensor],
) -> tuple[list[Piece], bool]:
    """The outermost candidates that `loss` is made of, and whether a parameter is reached beside them.

    A marked tensor takes the place of the candidates it feeds. A loss function that is used as a layer, inside of
    another loss, is no piece; neither is one whose value is used in both ways, nor one with an output that is made of
    another of its outputs: the derivative by that would count twice.
    """
    start = edge_of(loss)
    candidates = [c for c in candidates if not _is_nested(c.edges)]
    marks = {m.loss_edge: m.outputs[0] for m in marked}
    if _is_nested(list(marks)):
        raise RecordError("a tensor marked by tn.outputs is computed from another one: mark one of the two.")
    if marks:
        candidates = [c for c in candidates if not any(edge in marks for edge in walk(c.edges, marks))]
    named = {c.loss_edge for c in candidates if c.form is None} | marks.keys()
    chosen = _elementary_parts(start, weight, [c for c in candidates if c.form is not None], named, params)
    border = named | {c.loss_edge for c, _ in chosen}
    met = set(walk([start], border)) & border
    found = [c for c in candidates if c.loss_edge in met and c.form is None]
    chosen += zip(found, grad([start], [c.loss_edge for c in found], [weight]), strict=True)
    if len(chosen) > 1:  # one that another is made of has no weight of its own
        behind = set(_behind(c.loss_edge for c, _ in chosen))
        chosen = [(c, w) for c, w in chosen if c.loss_edge not in behind]
    border = marks.keys() | {c.loss_edge for c, _ in chosen}
    rest = reaches([start], params, border) or any(reaches([c.loss_edge], params, set(c.edges)) for c, _ in chosen)
    met_marks = {edge: z for edge, z in marks.items() if edge in met}
    if met_marks:
        chosen.append((Candidate("outputs", list(met_marks.values()), list(met_marks), start), weight))
    pieces = [Piece.weighted(c, w) for c, w in chosen if w is not None]
    return pieces, rest or not pieces


def _behind(edges: Iterable[Edge]) -> Iterator[Edge]:
    """Every edge that those are computed from."""
    return walk((node, number) for edge in edges for node, number in edge[0].next_functions if node is not None)


def _is_nested(edges: Sequence[Edge]) -> bool:
    """Whether one of them is computed from another."""
    return len(edges) > 1 and not set(edges).isdisjoint(_behind(edges))


def _elementary_parts(
    start: Edge, weight: Tensor, candidates: Sequence[Candidate], named: Set[Edge], params: Sequence[Tensor]
) -> list[tuple[Candidate, Tensor | None]]:
    """The outermost elementary functions that the loss is a sum of, convex with the weight that they have in it.

    Those made of the `named` losses and marks are none. Where there are named ones, nothing is looked for behind the
    product of two numbers that depend on the parameters, as in a focal loss. Penalties count where there is no other.
    """
    left = {c.loss_edge: c for c in candidates}
    if not left:
        return []
    is_named = not named.isdisjoint(walk([start], named))

    def passed(node: Node) -> bool:
        return is_passed(node, params, not is_named)

    while True:
        met = [left[edge] for edge in walk([start], named | left.keys(), passed) if edge in left]
        weights = grad([start], [c.loss_edge for c in met], [weight])
        wrong = [
            c
            for c, w in zip(met, weights, strict=True)
            if w is None
            or bool((c.sign * w < 0).any())
            or not named.isdisjoint(walk(c.edges, named, passed))
            or not reaches(c.edges, params, ())
        ]
        if not wrong:
            penalized = not is_named and all(c.is_penalty for c in met)
            return [(c, w) for c, w in zip(met, weights, strict=True) if penalized or not c.is_penalty]
        for c in wrong:
            del left[c.loss_edge]
