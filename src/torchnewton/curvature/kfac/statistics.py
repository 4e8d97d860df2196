"""The factors of every layer's block, from the inputs of its calls and sampled cotangents at their outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.kfac.blocks import Block, diagonal_of
from torchnewton.curvature.kfac.sampling import sampled_cotangents
from torchnewton.curvature.layer_jacobian.factors import explicit_layers
from torchnewton.curvature.layer_jacobian.layers import Convolution, Layer, Linear
from torchnewton.curvature.shared import Shared
from torchnewton.record import Tape
from torchnewton.record.graph import grad
from torchnewton.vectors import symmetric_product

Sharing = Literal["expand", "reduce"]

_OVER_LAST_DIMENSIONS = {F.layer_norm, F.rms_norm}
_OVER_CHANNELS = {F.batch_norm, F.group_norm}


@dataclass(frozen=True)
class Statistics:
    """How factors are taken: see `torchnewton.KFAC` for the arguments."""

    sharing: Sharing
    max_samples: int
    max_places: int
    max_size: int

    def blocks(self, tape: Tape, generator: torch.Generator, shared: Shared | None = None) -> list[Block]:
        """One sample of every block, of the samples of this process; `shared` as for `sampled_cotangents`.

        Blocks differ from process to process where the closures do; without samples there are none.

        Cost: a backward pass without the parameters' share, and per layer K² multiplications for each of at most
        `max_samples` samples or `max_places` places, O² for every place.
        """
        cotangents = sampled_cotangents(tape, generator, shared)
        if shared is not None and not shared.has_samples:
            return []
        layers, covered = explicit_layers(tape)
        live = {i for i, p in enumerate(tape.params) if p.requires_grad}
        layers = [layer for layer in layers if self._has_rule(layer)]
        held = covered & live & {p for layer in layers for p in layer.positions}
        rest = sorted(live - held)
        edges = [layer.call.edge for layer in layers]
        deltas: list[Tensor | None] = [None] * len(layers)
        gradients: list[Tensor | None] = [None] * len(rest)
        for term, u in zip(tape.terms, cotangents, strict=True):
            found = grad(term.edges, [*edges, *(tape.params[p] for p in rest)], u)
            deltas = [_sum(a, b) for a, b in zip(deltas, found[: len(edges)], strict=True)]
            gradients = [_sum(a, b) for a, b in zip(gradients, found[len(edges) :], strict=True)]
        blocks = [
            _diagonal_block(p, g) for p, g in zip(rest, gradients, strict=True) if g is not None and bool(g.any())
        ]
        used = [(layer, delta) for layer, delta in zip(layers, deltas, strict=True) if delta is not None]
        split = _apart([layer for layer, _ in used], held)
        uses: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for layer, delta in used:
            positions = tuple(p for p in (layer.weight_position, layer.bias_position) if p in held)
            for chosen in [(p,) for p in positions] if split & set(positions) else [positions]:
                uses.setdefault(chosen, []).append(self._factors(layer, delta.detach(), chosen))
        return blocks + [Block(chosen, *_joined(found)) for chosen, found in uses.items()]

    @staticmethod
    def _has_rule(layer: Layer) -> bool:
        function = layer.call.function
        known = isinstance(layer, (Linear, Convolution)) or function is F.embedding
        return known or function in _OVER_LAST_DIMENSIONS or function in _OVER_CHANNELS

    def _factors(self, layer: Layer, delta: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """L and R of one call for the weight, the bias, or both."""
        of_weight, of_bias = layer.weight_position in positions, layer.bias_position in positions
        if isinstance(layer, Linear):
            inputs, delta = (x.reshape(len(x), 1, -1, x.shape[-1]) for x in (layer.input, delta))
            return self._paired(inputs, delta, of_weight, of_bias)
        if isinstance(layer, Convolution):
            inputs = self._patches(layer) if of_weight else layer.input[:, :1].reshape(-1, 1, 1, 1)[:1]
            delta = delta.reshape(len(delta), layer.groups, -1, delta.shape[2:].numel()).mT
            return self._paired(inputs, delta, of_weight, of_bias)
        if layer.call.function is F.embedding:
            return self._embedding(layer, delta)
        return self._normalization(layer, delta, of_weight, of_bias)

    def _paired(self, inputs: Tensor, delta: Tensor, of_weight: bool, of_bias: bool) -> tuple[Tensor, Tensor]:
        """Inputs n × g × L × K and cotangents N × g × L × O; they need not be of the same samples and places."""
        if self.sharing == "reduce":
            inputs, delta = inputs.mean(2, keepdim=True), delta.sum(2, keepdim=True)
        most = self.max_samples if inputs.shape[2] == 1 else self.max_places
        inputs, delta = (
            x.transpose(0, 1).flatten(1, 2).to(_precise(x.dtype)) for x in (inputs, delta)
        )  # g × places × …
        left = self._second_moment(delta)
        inputs = inputs[:, :: math.ceil(inputs.shape[1] / most)]
        if not of_weight:
            return left, inputs.new_ones(len(inputs), 1, 1)
        right = self._second_moment(inputs) / inputs.shape[1]
        return left, _bordered(right, inputs.mean(1)) if of_bias else right

    def _second_moment(self, x: Tensor) -> Tensor:
        """Σ xxᵀ over places for x g × places × n; its diagonal alone where n is too large."""
        if x.shape[2] > self.max_size:
            return x.square().sum(1)
        return torch.stack([symmetric_product(part, part, part.dtype) for part in x])

    def _patches(self, layer: Convolution) -> Tensor:
        """Inputs of some places on a coarser grid, at most `max_places` of them."""
        x = F.pad(layer.input, [side for p in reversed(layer.padding) for side in (p, p)])
        n, outputs, coarse = len(x), layer.output_shape[2:], 1
        if self.sharing == "expand":
            while n * _coarser(outputs, coarse).numel() > self.max_places and coarse < max(outputs):
                coarse += 1
        places = _coarser(outputs, coarse)
        strides = x.stride()[2:]
        steps = [stride * step * coarse for stride, step in zip(strides, layer.stride, strict=True)]
        taps = [stride * step for stride, step in zip(strides, layer.dilation, strict=True)]
        margins = [(size - 1 - (count - 1) * coarse) // 2 for size, count in zip(outputs, places, strict=True)]
        first = sum(m * step // coarse for m, step in zip(margins, steps, strict=True))
        shape, stride = [*x.shape[:2], *places, *layer.kernel], [*x.stride()[:2], *steps, *taps]
        windows = x.as_strided(shape, stride, x.storage_offset() + first)
        if self.sharing == "reduce":
            windows = windows.mean(list(range(2, 2 + len(places))), keepdim=True)
            places = torch.Size([1])
        else:
            windows = windows[:: math.ceil(n * places.numel() / self.max_places)]
        grouped = windows.unflatten(1, (layer.groups, -1))
        dims = len(layer.kernel)
        order = [0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
        patches: Tensor = grouped.permute(order).reshape(len(windows), layer.groups, places.numel(), -1)
        return patches

    def _embedding(self, layer: Layer, delta: Tensor) -> tuple[Tensor, Tensor]:
        """L = diag(frequencies of the tokens), exactly, and R = Σ δδᵀ; the padding token has neither."""
        weight, padding = layer.arguments["weight"], layer.arguments.get("padding_idx")
        tokens, delta = layer.input.reshape(-1), delta.reshape(-1, delta.shape[-1]).to(_precise(delta.dtype))
        if padding is not None:
            kept = tokens != padding % len(weight)
            tokens, delta = tokens[kept], delta[kept]
        counts = torch.bincount(tokens, minlength=len(weight)).to(delta.dtype)
        return counts.unsqueeze(0) / max(len(tokens), 1), self._second_moment(delta.unsqueeze(0))

    def _normalization(self, layer: Layer, delta: Tensor, of_scale: bool, of_shift: bool) -> tuple[Tensor, Tensor]:
        """R = Σ g gᵀ for the derivatives g of single samples in scale and shift; without bias, as a full block."""
        found = []
        if of_scale:
            parameters = {layer.positions[0]: torch.ones_like(layer.arguments["weight"])}
            if layer.bias_position is not None:
                parameters[layer.bias_position] = torch.zeros_like(layer.arguments["bias"])
            found.append(_per_sample(layer, layer.product(parameters) * delta))
        if of_shift:
            found.append(_per_sample(layer, delta))
        rows = torch.cat(found, dim=1)
        rows = rows.to(_precise(rows.dtype)).unsqueeze(0)
        return rows.new_ones(1, 1, 1), self._second_moment(rows)


def _per_sample(layer: Layer, x: Tensor) -> Tensor:
    """Sums over the places of a sample: N × C."""
    if layer.call.function in _OVER_CHANNELS:
        return x.flatten(2).sum(2) if x.dim() > 2 else x
    width = int(math.prod(layer.arguments["normalized_shape"]))
    samples = len(x) if x.dim() > len(layer.arguments["normalized_shape"]) else 1
    return x.reshape(samples, -1, width).sum(1)


def _diagonal_block(position: int, gradient: Tensor) -> Block:
    """diag(g²), where E[g²] is the diagonal of G for the sampled gradient g."""
    g = gradient.detach().to(_precise(gradient.dtype)).reshape(1, -1)
    return Block((position,), g.new_ones(1, 1, 1), g.square())


def _apart(layers: Sequence[Layer], held: set[int]) -> set[int]:
    """The positions that are used together with different others: weight and bias get a block each."""
    found: dict[int, set[int]] = {}
    mixed: set[int] = set()
    for layer in layers:
        together = held & set(layer.positions)
        for p in together:
            if found.setdefault(p, together) != together:
                mixed |= together | found[p]
    return mixed


def _joined(uses: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One L ⊗ R with the partial traces of Σ Lᵢ ⊗ Rᵢ."""
    if len(uses) == 1:
        return uses[0]
    lefts = [diagonal_of(L).sum(1) for L, _ in uses]
    rights = [diagonal_of(R).sum(1) for _, R in uses]
    tiny = torch.finfo(lefts[0].dtype).tiny
    total = torch.stack([a * b for a, b in zip(lefts, rights, strict=True)]).sum(0).clamp(min=tiny)
    left = _added([_weighted(L, b / total) for (L, _), b in zip(uses, rights, strict=True)])
    return left, _added([_weighted(R, a) for (_, R), a in zip(uses, lefts, strict=True)])


def _weighted(factor: Tensor, weights: Tensor) -> Tensor:
    return factor * weights.view(-1, *[1] * (factor.dim() - 1))


def _added(factors: Sequence[Tensor]) -> Tensor:
    if len({factor.dim() for factor in factors}) > 1:
        factors = [torch.diag_embed(factor) if factor.dim() == 2 else factor for factor in factors]
    return torch.stack(list(factors)).sum(0)


def _bordered(moment: Tensor, mean: Tensor) -> Tensor:
    """The second moment of (a, 1) from those of a."""
    if moment.dim() == 2:
        return F.pad(moment, [0, 1], value=1.0)
    wide = F.pad(moment, [0, 1, 0, 1], value=1.0)
    wide[:, -1, :-1] = wide[:, :-1, -1] = mean
    return wide


def _coarser(outputs: Sequence[int], step: int) -> torch.Size:
    return torch.Size([-(-size // step) for size in outputs])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
