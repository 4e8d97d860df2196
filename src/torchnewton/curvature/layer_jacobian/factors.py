"""The explicit factors of a Jacobian: layer inputs, and the cotangents of every output of a sample at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.curvature.groups import OutputGroup, output_groups
from torchnewton.curvature.layer_jacobian.cotangents import Cotangents, SharedCotangents, stored
from torchnewton.curvature.layer_jacobian.cut import Cut, Users, find_cut
from torchnewton.curvature.layer_jacobian.layers import Layer, layer_of
from torchnewton.record import Tape, Term
from torchnewton.record.graph import edge_of, grad


@dataclass(frozen=True)
class Factor:
    """What one layer call contributes to the rows of one output group, by D = ∂z/∂t at its cut."""

    layer: Layer
    cut: Cut
    group: int
    cotangents: Cotangents | SharedCotangents

    def product(self, s: Tensor) -> Tensor:
        """D · s, N × M."""
        return self.cotangents.product(self.cut.select(s).view(self.layer.num_samples, -1))

    def adjoint(self, u: Tensor) -> Tensor:
        """Dᵀu in the shape of s."""
        return self.cut.scatter(self.cotangents.adjoint(u.to(self.layer.dtype)), self.layer.output_shape)

    def at_output(self, cotangents: Tensor) -> Tensor:
        """Cotangents in the place of D, N × M × entries of t, as N × M × shape of a sample of s."""
        n, m = cotangents.shape[:2]
        shape = self.layer.output_shape
        if self.cut.index is None:
            return cotangents.view(n, m, *shape[1:])
        columns = [self.cut.scatter(cotangents[:, i].contiguous(), shape) for i in range(m)]
        return torch.stack(columns, dim=1).view(n, m, *shape[1:])


@dataclass(frozen=True)
class Factors:
    """All factors of a tape, and the positions of the parameters whose whole Jacobian they make up."""

    groups: list[OutputGroup]
    factors: list[Factor]
    covered: set[int]


def factorize(tape: Tape, layers: Sequence[Layer], covered: set[int], max_bytes: float) -> Factors:
    """The factors of as many of `layers` as fit into `max_bytes`, those first that save most for their size.

    Cost: a backward pass without the parameters' share (a third of a gradient) for each of the M numbers a sample has
    in the outputs, and one with random cotangents, which shows where samples are mixed.
    """
    groups = output_groups(tape)
    if any(z.dim() == 0 for z in tape.outputs):
        return Factors(groups, [], set())
    users = Users(edge for term in tape.terms for edge in term.edges)
    cuts, left_out = _cuts(tape, layers, groups, users, max_bytes)
    lost = {position for layer in left_out for position in layer.positions}
    factors = []
    for number, group in enumerate(groups):
        found, mixing = _of_group(tape.terms[group.term], group, number, cuts)
        factors += found
        lost |= {position for layer in mixing for position in layer.positions}
    covered = covered - lost
    return Factors(groups, [f for f in factors if covered & set(f.layer.positions)], covered)


def explicit_layers(tape: Tape) -> tuple[list[Layer], set[int]]:
    """The layers the outputs depend on, and the positions of parameters that are used in these and nowhere else."""
    users = Users(edge for term in tape.terms for edge in term.edges)
    positions = {id(p): i for i, p in enumerate(tape.params)}
    layers = [layer for call in tape.layer_calls if (layer := layer_of(call, positions)) is not None]
    layers = [layer for layer in layers if users.reaches_outputs(layer.call.edge)]
    calls = {layer.call.edge for layer in layers}
    explicit = [position for layer in layers for position in layer.positions]
    covered = {
        position
        for position, p in enumerate(tape.params)
        if not p.requires_grad or users.uses(edge_of(p), calls) == explicit.count(position)
    }
    return [layer for layer in layers if layer.output_shape.numel() and covered & set(layer.positions)], covered


def _cuts(
    tape: Tape, layers: Sequence[Layer], groups: list[OutputGroup], users: Users, max_bytes: float
) -> tuple[dict[Layer, Cut], list[Layer]]:
    """The cuts of the layers that fit, and the layers that do not."""

    def bytes_of(layer: Layer, entries: int) -> float:
        widths = sum(group.width for group in groups if group.num_samples == layer.num_samples)
        return float(tape.params[0].element_size()) * entries * widths

    cuts, left_out, total = {}, [], 0.0
    for layer in sorted(layers, key=lambda layer: bytes_of(layer, layer.output_shape.numel()) / layer.forward_flops):
        cut = None
        if bytes_of(layer, layer.output_shape.numel()) <= 16 * max_bytes:
            cut = find_cut(layer.call.edge, layer.output_shape, users, tape.sizes, tape.params[0])
        if cut is None or total + bytes_of(layer, cut.shape.numel()) > max_bytes:
            left_out.append(layer)
        else:
            cuts[layer] = cut
            total += bytes_of(layer, cut.shape.numel())
    return cuts, left_out


def _of_group(term: Term, group: OutputGroup, number: int, cuts: dict[Layer, Cut]) -> tuple[list[Factor], list[Layer]]:
    """The factors of one group of outputs, and the layers in which its samples are not apart."""
    edges = [cut.edge for cut in cuts.values()]
    outputs = [term.edges[i] for i in group.members]

    def pull(u: Tensor) -> list[Tensor | None]:
        parts = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in term.outputs]
        group.add(u, parts)
        return grad(outputs, edges, [parts[i] for i in group.members])

    like = term.outputs[group.members[0]]
    generator = torch.Generator(device=like.device).manual_seed(0)
    shape = (group.num_samples, group.width)
    u = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    expected = pull(u)
    reached = {i: e for i, e in enumerate(expected) if e is not None}
    places = list(cuts.items())
    mixing = [places[i][0] for i in reached if places[i][0].num_samples != group.num_samples]
    mine = {i: e for i, e in reached.items() if places[i][0].num_samples == group.num_samples}
    cotangents = {i: e.new_empty(group.num_samples, group.width, e[0].numel()) for i, e in mine.items()}
    for column in range(group.width if mine else 0):
        unit = torch.zeros_like(u)
        unit[:, column] = 1
        found = pull(unit)
        for i, D in cotangents.items():
            g = found[i]
            D[:, column] = 0 if g is None else g.reshape(len(g), -1)
    factors = []
    for i, D in cotangents.items():
        layer, cut = places[i]
        combined = torch.bmm(u.to(D.dtype).unsqueeze(1), D).flatten()
        wanted = mine[i].reshape(-1)
        if not bool((combined - wanted).norm() <= torch.finfo(D.dtype).eps ** 0.5 * wanted.norm()):
            mixing.append(layer)
            continue
        if cut.weight is not None:
            D *= cut.weight.view(len(D), 1, -1)
        factors.append(Factor(layer, cut, number, stored(D)))
    return factors, mixing
