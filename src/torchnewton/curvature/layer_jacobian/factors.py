"""The explicit factors of a Jacobian: layer inputs, and the cotangents of every output of a sample at each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchnewton.curvature.groups import OutputGroup, output_groups
from torchnewton.curvature.layer_jacobian.apart import rows_stay_apart
from torchnewton.curvature.layer_jacobian.cotangents import Cotangents, SharedCotangents, stored
from torchnewton.curvature.layer_jacobian.cut import Cut, Users, find_cut
from torchnewton.curvature.layer_jacobian.layers import Layer, layer_of
from torchnewton.curvature.output_root import OutputRoot
from torchnewton.record import Tape, Term
from torchnewton.record.graph import edge_of, grad
from torchnewton.vectors import Vector, add_


@dataclass(frozen=True)
class Factor:
    """What one layer call contributes to the rows of one output group: D = ∂z/∂t at its cut, or RᵀD."""

    layer: Layer
    cut: Cut
    group: int
    cotangents: Cotangents | SharedCotangents

    def product(self, s: Tensor) -> Tensor:
        """D · s, N × width."""
        return self.cotangents.product(self.cut.select(s).reshape(self.layer.num_samples, -1))

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


class Factors:
    """All factors of a tape: products with J, or with R = B^½J where the roots of the output Hessians are given.

    `covered` are the positions of the parameters whose whole Jacobian the factors make up: those of `layers` that fit
    into `max_bytes`, taken in the order of what they save for their size, and that keep samples apart. All others go
    by kept double backward.

    Cost: a backward pass without the parameters' share (a third of a gradient) for each of the M numbers a sample has
    in the outputs (for R each column of its root), and, where the graph's operations do not tell, one with random
    cotangents, which shows where samples are mixed.
    """

    def __init__(
        self,
        tape: Tape,
        layers: Sequence[Layer],
        covered: set[int],
        max_bytes: float,
        roots: Sequence[OutputRoot] | None = None,
        users: Users | None = None,
    ) -> None:
        self.tape = tape
        self.groups = output_groups(tape)
        self.roots = roots
        self.factors: list[Factor] = []
        self.covered: set[int] = set()
        if any(z.dim() == 0 for z in tape.outputs):
            return
        users = users_of(tape) if users is None else users
        cuts, left_out = _cuts(tape, layers, self.groups, users, max_bytes)
        lost = {position for layer in left_out for position in layer.positions}
        found: list[Factor] = []
        for number, group in enumerate(self.groups):
            root = None if roots is None else roots[number]
            factors, mixing = _of_group(tape.terms[group.term], group, number, root, cuts)
            found += factors
            lost |= {position for layer in mixing for position in layer.positions}
        self.covered = covered - lost
        self.factors = [f for f in found if self.covered & set(f.layer.positions)]

    def compress(self) -> None:
        """Store the cotangents in the shorter form where they have it: pays for many products."""
        self.factors = [replace(f, cotangents=stored(f.cotangents.dense())) for f in self.factors]

    @property
    def is_complete(self) -> bool:
        """Whether all parameters are covered."""
        return len(self.covered) == len(self.tape.params)

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Jv or Rv, N × width for each group."""
        found: list[Tensor | None] = [None] * len(self.groups)
        if not self.is_complete:
            u = [y for term in self.tape.terms for y in term.jacobian_product(self._rest(v))]
            for i, group in enumerate(self.groups):
                joined = group.join(self.tape.of_term(u, group.term))
                found[i] = joined if self.roots is None else self.roots[i].weigh(joined.unsqueeze(2)).squeeze(2)
        chosen = {i: w if i in self.covered else torch.zeros_like(w) for i, w in enumerate(v)}
        moved: dict[Layer, Tensor] = {}
        for factor in self.factors:
            if factor.layer not in moved:
                moved[factor.layer] = factor.layer.product(chosen)
            part, before = factor.product(moved[factor.layer]), found[factor.group]
            found[factor.group] = part if before is None else before + part
        return [self._zeros(i) if part is None else part for i, part in enumerate(found)]

    def adjoint(self, w: Sequence[Tensor]) -> Vector:
        """Jᵀw or Rᵀw."""
        deltas: dict[Layer, Tensor] = {}
        for factor in self.factors:
            delta = factor.adjoint(w[factor.group])
            deltas[factor.layer] = deltas[factor.layer] + delta if factor.layer in deltas else delta
        total: dict[int, Tensor] = {}
        for layer, delta in deltas.items():
            for position, g in layer.adjoint(delta):
                if position in self.covered:
                    total[position] = total[position] + g if position in total else g
        params = self.tape.params
        found = [total[i].view_as(p) if i in total else torch.zeros_like(p) for i, p in enumerate(params)]
        if not self.is_complete:
            u = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in self.tape.outputs]
            for i, group in enumerate(self.groups):
                joined = w[i] if self.roots is None else self.roots[i].spread(w[i])
                group.add(joined, self.tape.of_term(u, group.term))
            for number, term in enumerate(self.tape.terms):
                add_(found, term.jacobian_adjoint(self.tape.of_term(u, number), self._rest(params)))
        return found

    def _rest(self, v: Sequence[Tensor]) -> list[Tensor | None]:
        return [None if i in self.covered else w for i, w in enumerate(v)]

    def _zeros(self, number: int) -> Tensor:
        group = self.groups[number]
        width = group.width if self.roots is None else self.roots[number].width
        like = self.tape.terms[group.term].outputs[group.members[0]]
        return torch.zeros(group.num_samples, width, dtype=like.dtype, device=like.device)


def users_of(tape: Tape) -> Users:
    """Who takes what in the graph behind the outputs."""
    return Users(edge for term in tape.terms for edge in term.edges)


def explicit_layers(tape: Tape, users: Users | None = None) -> tuple[list[Layer], set[int]]:
    """The layers the outputs depend on, and the positions of parameters that are used in these and nowhere else."""
    users = users_of(tape) if users is None else users
    positions = {id(p): i for i, p in enumerate(tape.params) if p.requires_grad}
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

    def price(layer: Layer) -> float:
        return bytes_of(layer, layer.output_shape.numel()) / max(layer.forward_flops, 1.0)

    cuts, left_out, total = {}, [], 0.0
    for layer in sorted(layers, key=price):
        cut = None
        if bytes_of(layer, layer.output_shape.numel()) <= 16 * max_bytes:
            cut = find_cut(layer.call.edge, layer.output_shape, users, tape.sizes, tape.params[0])
        if cut is None or total + bytes_of(layer, cut.shape.numel()) > max_bytes:
            left_out.append(layer)
        else:
            cuts[layer] = cut
            total += bytes_of(layer, cut.shape.numel())
    return cuts, left_out


def _of_group(
    term: Term, group: OutputGroup, number: int, root: OutputRoot | None, cuts: dict[Layer, Cut]
) -> tuple[list[Factor], list[Layer]]:
    """The factors of one group of outputs, and the layers in which its samples are not apart."""
    edges = [cut.edge for cut in cuts.values()]
    outputs = [term.edges[i] for i in group.members]

    def pull(w: Tensor) -> list[Tensor | None]:
        parts = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in term.outputs]
        group.add(w if root is None else root.spread(w), parts)
        return grad(outputs, edges, [parts[i] for i in group.members])

    like = term.outputs[group.members[0]]
    generator = torch.Generator(device=like.device).manual_seed(0)
    width = group.width if root is None else root.width
    w = torch.randn(group.num_samples, width, generator=generator, dtype=like.dtype, device=like.device)
    places = list(cuts.items())
    first, is_sure = torch.zeros_like(w), width > 0 and rows_stay_apart(outputs)
    first[:, :1] = 1
    reached = {i: e for i, e in enumerate(pull(first if is_sure else w)) if e is not None}
    mixing = [places[i][0] for i in reached if places[i][0].num_samples != group.num_samples]
    mine = {i: e for i, e in reached.items() if places[i][0].num_samples == group.num_samples}
    cotangents = {
        i: e.new_empty(group.num_samples, width, e[0].numel(), dtype=places[i][0].dtype) for i, e in mine.items()
    }
    for column in range(width if mine else 0):
        unit = torch.zeros_like(w)
        unit[:, column] = 1
        found = [mine.get(i) for i in range(len(edges))] if is_sure and not column else pull(unit)
        for i, D in cotangents.items():
            g = found[i]
            D[:, column] = 0 if g is None else g.reshape(len(g), -1)
    factors = []
    for i, D in cotangents.items():
        layer, cut = places[i]
        if not (is_sure or _agree(w, D, mine[i])):
            mixing.append(layer)
            continue
        if cut.weight is not None:
            D *= cut.weight.view(len(D), 1, -1)
        factors.append(Factor(layer, cut, number, Cotangents(D)))
    return factors, mixing


def _agree(w: Tensor, D: Tensor, found: Tensor) -> bool:
    """Whether the derivative of Σ wz is what the samples' own derivatives D make it."""
    difference = torch.bmm(w.to(D.dtype).unsqueeze(1), D).flatten() - found.reshape(-1)
    return bool(difference.norm() <= torch.finfo(D.dtype).eps ** 0.5 * found.norm())
