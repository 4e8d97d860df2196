"""Calls that are linear in their parameters: s = call(x; p), its product, its adjoint, its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.record import LayerCall

# function: the names of its arguments as far as the last parameter; parameters are `weight` and `bias`
_ARGUMENTS: Mapping[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.conv1d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.conv3d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.conv_transpose1d: ("input", "weight", "bias"),
    torch.conv_transpose2d: ("input", "weight", "bias"),
    torch.conv_transpose3d: ("input", "weight", "bias"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    F.group_norm: ("input", "num_groups", "weight", "bias"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    F.rms_norm: ("input", "normalized_shape", "weight"),
}
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
_NORMALIZATIONS = {F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm}


def layer_of(call: LayerCall, positions: Mapping[int, int]) -> Layer | None:
    """The layer of a call; None where the call is not known to be linear in its parameters given the other inputs.

    `positions` gives the place of a live parameter, by its id, among the parameters.
    """
    names = _ARGUMENTS.get(call.function)
    if names is None or not call.exact or len(call.output_shape) == 0:
        return None
    arguments = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    slots = {id(arguments.get(name)) for name in ("weight", "bias")}
    if any(id(p) not in slots for p in call.parameters):
        return None
    if arguments.get("max_norm") is not None or arguments.get("scale_grad_by_freq"):
        return None
    if not all(p.numel() for p in call.parameters):
        return None
    x = arguments["input"]
    if x.dim() <= _dims_of_sample(call.function, arguments) or x.shape[0] != call.output_shape[0] or id(x) in slots:
        return None
    kind: type[Layer] = Layer
    if call.function is F.linear and arguments["weight"].dim() == 2:
        kind = Linear
    elif call.function in _CONVOLUTIONS:
        kind = Convolution
    elif call.function in _NORMALIZATIONS:
        kind = Normalization
    return kind(call, arguments, positions)


def _dims_of_sample(function: Any, arguments: Mapping[str, Any]) -> int:
    """The dimensions that the input of a single sample has at least; one more and the first is that of the samples."""
    if function in (F.layer_norm, F.rms_norm):
        return len(arguments["normalized_shape"])
    dims = _CONVOLUTIONS.get(function, _TRANSPOSED.get(function))
    if dims is not None:
        return dims + 1
    return 0 if function is F.embedding else 1


class Layer:
    """One call. `positions` are those of its live parameters: the weight, the bias, or both.

    This class takes any function of the table through autograd; the layers that matter for speed have their own
    products below.
    """

    def __init__(self, call: LayerCall, arguments: Mapping[str, Any], positions: Mapping[int, int]) -> None:
        self.call = call
        self.arguments = arguments
        self.input: Tensor = arguments["input"].detach()
        self.weight_position = positions.get(id(arguments.get("weight")))
        self.bias_position = positions.get(id(arguments.get("bias")))
        self.positions = [p for p in (self.weight_position, self.bias_position) if p is not None]
        self.output_shape = call.output_shape

    @property
    def num_samples(self) -> int:
        """N, the first dimension of input and output."""
        return self.output_shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters and of s."""
        return self._parameters[0].dtype

    @property
    def num_parameters(self) -> int:
        """The entries of the live parameters."""
        return sum(p.numel() for p in self._parameters)

    @property
    def forward_flops(self) -> float:
        """Operations of the call."""
        return 2.0 * self.output_shape.numel()

    def product(self, v: Mapping[int, Tensor]) -> Tensor:
        """ṡ = call(x; v): the derivative of s along v, v by position."""
        padding = self.arguments.get("padding_idx")
        if padding is not None:  # rows that autograd takes for constant
            v = {position: w.clone() for position, w in v.items()}
            v[self.positions[0]][padding] = 0
        return self._call(v)

    def _call(self, v: Mapping[int, Tensor], x: Tensor | None = None) -> Tensor:
        weight, bias = self.arguments.get("weight"), self.arguments.get("bias")
        tensors = []
        for t in self.call.tensors:
            if t is self.arguments["input"]:
                tensors.append(self.input if x is None else x)
            elif t is weight:
                tensors.append(torch.zeros_like(t) if self.weight_position is None else v[self.weight_position])
            elif t is bias:
                tensors.append(torch.zeros_like(t) if self.bias_position is None else v[self.bias_position])
            else:
                tensors.append(t.detach().clone())  # running statistics, which the call may move
        return self.call(tensors)

    @cached_property
    def _graph(self) -> tuple[Tensor, list[Tensor]]:
        """s once more, with the parameters alone as leaves."""
        parameters = {p: torch.zeros_like(t) for p, t in zip(self.positions, self._parameters, strict=True)}
        with torch.enable_grad():
            for leaf in parameters.values():
                leaf.requires_grad_()
            return self._call(parameters), list(parameters.values())

    @property
    def _parameters(self) -> list[Tensor]:
        names = [("weight", self.weight_position), ("bias", self.bias_position)]
        return [self.arguments[name].detach() for name, position in names if position is not None]

    def adjoint(self, delta: Tensor) -> list[tuple[int, Tensor]]:
        """The derivative of ⟨s, δ⟩ in each parameter."""
        s, leaves = self._graph
        return list(zip(self.positions, torch.autograd.grad(s, leaves, delta, retain_graph=True), strict=True))

    def rows(self, cotangents: Tensor) -> list[tuple[int, Tensor]]:
        """For cotangents D (N × M × shape of a sample of s): each parameter's rows, N × M × its entries."""
        leaves = self._parameters
        cotangents = cotangents.to(leaves[0].dtype)

        def one(x: Tensor, unit: Tensor) -> tuple[Tensor, ...]:
            def output(*parameters: Tensor) -> Tensor:
                return self._call(dict(zip(self.positions, parameters, strict=True)), x.unsqueeze(0))

            pull: tuple[Tensor, ...] = torch.func.vjp(output, *leaves)[1](unit.unsqueeze(0))
            return pull

        over_columns = torch.func.vmap(one, in_dims=(None, 0))
        found = torch.func.vmap(over_columns, in_dims=(0, 0))(self.input, cotangents)
        return [(p, rows.flatten(2)) for p, rows in zip(self.positions, found, strict=True)]

    def columns(self, cotangents: Tensor, chunk_bytes: float) -> Iterator[Tensor]:
        """The rows in all parameters of the layer, some columns at a time, N × M × columns, in any order."""
        yield torch.cat([rows for _, rows in self.rows(cotangents)], dim=2)


class Normalization(Layer):
    """s = w ⊙ x̂ + b: Layer-, RMS-, Group- and BatchNorm, whose x̂ may mix samples."""

    @cached_property
    def normalized(self) -> Tensor:
        """x̂."""
        parameters = zip(self.positions, self._parameters, strict=True)
        return self._call(
            {p: torch.ones_like(t) if p == self.weight_position else torch.zeros_like(t) for p, t in parameters}
        )

    def product(self, v: Mapping[int, Tensor]) -> Tensor:
        """ẇ ⊙ x̂ + ḃ."""
        s = torch.zeros(self.output_shape, dtype=self.dtype, device=self.input.device)
        if self.weight_position is not None:
            s = s + self._spread(v[self.weight_position]) * self.normalized
        return s if self.bias_position is None else s + self._spread(v[self.bias_position])

    def adjoint(self, delta: Tensor) -> list[tuple[int, Tensor]]:
        """Sums over the places that share a number of w."""
        return [(p, rows.sum((0, 1))) for p, rows in self.rows(delta.unsqueeze(1))]

    def rows(self, cotangents: Tensor) -> list[tuple[int, Tensor]]:
        """See `Layer.rows`."""
        found = []
        if self.weight_position is not None:
            found.append((self.weight_position, self._gather(cotangents * self.normalized.unsqueeze(1))))
        if self.bias_position is not None:
            found.append((self.bias_position, self._gather(cotangents)))
        return found

    @property
    def _is_by_channel(self) -> bool:
        return "normalized_shape" not in self.arguments

    def _spread(self, p: Tensor) -> Tensor:
        return p.view(-1, *[1] * (len(self.output_shape) - 2)) if self._is_by_channel else p

    def _gather(self, rows: Tensor) -> Tensor:
        """Sums over the places of a channel, or over the dimensions in front of the normalized ones."""
        n, m = rows.shape[:2]
        if self._is_by_channel:
            return rows.reshape(n, m, self.output_shape[1], -1).sum(-1)
        return rows.reshape(n, m, -1, self._parameters[0].numel()).sum(2)


class Paired(Layer):
    """A layer with one matrix product: s_l = W a_l + b at L places l of a sample, in g groups of channels.

    Its rows are sums over the places of outer products: ∂z_m/∂W = Σ_l D_ml a_lᵀ.
    """

    groups = 1

    @property
    def fan_in(self) -> int:
        """K, the length of a."""
        weight: Tensor = self.arguments["weight"]
        return weight.numel() // weight.shape[0]

    @property
    def places(self) -> int:
        """L."""
        return self.output_shape.numel() // (self.num_samples * int(self.arguments["weight"].shape[0]))

    @property
    def forward_flops(self) -> float:
        """Operations of the call."""
        return 2.0 * self.output_shape.numel() * self.fan_in

    def inputs(self) -> Tensor:
        """a as N × g × L × K."""
        raise NotImplementedError

    def cotangents(self, cotangents: Tensor) -> Tensor:
        """D as N × M × g × (outputs of a group) × L."""
        raise NotImplementedError

    def rows(self, cotangents: Tensor) -> list[tuple[int, Tensor]]:
        """See `Layer.rows`."""
        D = self.cotangents(cotangents)
        found = []
        if self.weight_position is not None:
            found.append((self.weight_position, _outer_products(D, self.inputs().to(D.dtype))))
        if self.bias_position is not None:
            found.append((self.bias_position, D.sum(-1).flatten(2)))
        return found

    def columns(self, cotangents: Tensor, chunk_bytes: float) -> Iterator[Tensor]:
        """See `Layer.columns`: some outputs of the layer at a time."""
        D = self.cotangents(cotangents)
        n, m, g, outputs, _ = D.shape
        if self.bias_position is not None:
            yield D.sum(-1).flatten(2)
        if self.weight_position is not None:
            inputs = self.inputs().to(D.dtype)
            step = max(1, int(chunk_bytes / (n * m * g * self.fan_in * D.element_size())))
            for start in range(0, outputs, step):
                yield _outer_products(D[:, :, :, start : start + step], inputs)


class Linear(Paired):
    """s = x Wᵀ + b, on sequences of any number of dimensions as well."""

    def product(self, v: Mapping[int, Tensor]) -> Tensor:
        """One matrix product."""
        bias = None if self.bias_position is None else v[self.bias_position]
        weight = self.arguments["weight"]
        weight = torch.zeros_like(weight) if self.weight_position is None else v[self.weight_position]
        return F.linear(self.input, weight, bias)

    def adjoint(self, delta: Tensor) -> list[tuple[int, Tensor]]:
        """One matrix product."""
        return self.adjoint_of(delta, self.input)

    def adjoint_of(self, delta: Tensor, x: Tensor) -> list[tuple[int, Tensor]]:
        """The adjoint with another input."""
        delta = delta.reshape(-1, delta.shape[-1])
        found = []
        if self.weight_position is not None:
            found.append((self.weight_position, delta.mT @ x.reshape(len(delta), -1)))
        if self.bias_position is not None:
            found.append((self.bias_position, delta.sum(0)))
        return found

    def inputs(self) -> Tensor:
        """See `Paired.inputs`."""
        return self.input.reshape(self.num_samples, 1, -1, self.input.shape[-1])

    def cotangents(self, cotangents: Tensor) -> Tensor:
        """See `Paired.cotangents`."""
        n, m = cotangents.shape[:2]
        return cotangents.reshape(n, m, 1, -1, cotangents.shape[-1]).mT


class Convolution(Paired):
    """s = W * x + b with stride, padding, dilation and groups, in one to three dimensions."""

    def __init__(self, call: LayerCall, arguments: Mapping[str, Any], positions: Mapping[int, int]) -> None:
        super().__init__(call, arguments, positions)
        dims = self.input.dim() - 2
        self.kernel = tuple(arguments["weight"].shape[2:])
        self.stride = _each(arguments.get("stride", 1), dims)
        self.dilation = _each(arguments.get("dilation", 1), dims)
        self.groups = int(arguments.get("groups", 1))
        padding = arguments.get("padding", 0)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            self.padding = tuple(t // 2 for t in total)
            if any(t % 2 for t in total):  # one more zero at the end
                ends = [side for t in reversed(total) for side in (0, t % 2)]
                self.input = F.pad(self.input, ends)
        else:
            self.padding = _each(0 if padding == "valid" else padding, dims)

    def product(self, v: Mapping[int, Tensor]) -> Tensor:
        """One convolution."""
        weight = v.get(-1 if self.weight_position is None else self.weight_position)
        bias = None if self.bias_position is None else v[self.bias_position]
        if weight is None:
            weight = torch.zeros_like(self.arguments["weight"])
        s: Tensor = self.call.function(self.input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return s

    def adjoint(self, delta: Tensor) -> list[tuple[int, Tensor]]:
        """One convolution."""
        weight = self.arguments["weight"].detach()
        wanted = [False, self.weight_position is not None, self.bias_position is not None]
        in_weight: Tensor
        in_bias: Tensor
        _, in_weight, in_bias = torch.ops.aten.convolution_backward(
            delta,
            self.input,
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            wanted,
        )
        both = ((self.weight_position, in_weight), (self.bias_position, in_bias))
        return [(position, g) for position, g in both if position is not None]

    def inputs(self) -> Tensor:
        """The patches: see `Paired.inputs`."""
        x = F.pad(self.input, [side for p in reversed(self.padding) for side in (p, p)])
        n, channels = x.shape[:2]
        windows = list(x.stride()[:2])
        outputs, steps, taps = list(self.output_shape[2:]), [], []
        for i, stride in enumerate(x.stride()[2:]):
            steps.append(stride * self.stride[i])
            taps.append(stride * self.dilation[i])
        patches = x.as_strided([n, channels, *outputs, *self.kernel], [*windows, *steps, *taps])
        grouped = patches.unflatten(1, (self.groups, channels // self.groups))
        dims = len(outputs)
        order = [0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
        found: Tensor = grouped.permute(order).reshape(n, self.groups, math.prod(outputs), -1)
        return found

    def cotangents(self, cotangents: Tensor) -> Tensor:
        """See `Paired.cotangents`."""
        n, m = cotangents.shape[:2]
        return cotangents.reshape(n, m, self.groups, self.output_shape[1] // self.groups, -1)


def _outer_products(D: Tensor, inputs: Tensor) -> Tensor:
    """Σ over places of D aᵀ: from N × M × g × O × L and N × g × L × K to N × M × (g·O·K)."""
    n, m, g, outputs, places = D.shape
    if g == places == 1 and (m * outputs == 1 or inputs.shape[-1] == 1):  # which batched products are slow at
        return (D.reshape(n, m * outputs, 1) * inputs.reshape(n, 1, -1)).view(n, m, -1)
    left = D.transpose(1, 2).reshape(n * g, m * outputs, places)
    rows = torch.bmm(left, inputs.reshape(n * g, places, -1))
    return rows.view(n, g, m, -1).transpose(1, 2).reshape(n, m, -1)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
