"""Layers that are no product: pools by the real part, dropout with the real mask, normalizations, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.complex_step.pair import (
    PYTHON_RULES,
    ComplexPair,
    is_pair,
    re,
    rule,
)

# --- pools -----------------------------------------------------------------------------------------------------------


def gathered(input: ComplexPair, values: Tensor, indices: Tensor, dims: int) -> ComplexPair:
    """The entries at `indices`, which count over the last `dims` dimensions."""
    flat = input.im.flatten(-dims).gather(-1, indices.flatten(-dims))
    return ComplexPair(values, flat.view(indices.shape))


def _max_pool(dims: int) -> None:
    with_indices = getattr(F, f"max_pool{dims}d_with_indices")

    def pool_with_indices(input: ComplexPair, *args: Any, **kwargs: Any) -> tuple[ComplexPair, Tensor]:
        kwargs.pop("return_indices", None)
        values, indices = with_indices(input.re, *args[:5], **kwargs)
        return gathered(input, values, indices, dims), indices

    def pool(input: ComplexPair, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("return_indices", args[5] if len(args) > 5 else False)
        found = pool_with_indices(input, *args, **kwargs)
        return found if wanted else found[0]

    rule(f"max_pool{dims}d")(pool)
    rule(f"max_pool{dims}d_with_indices")(pool_with_indices)
    PYTHON_RULES[getattr(F, f"max_pool{dims}d")] = pool
    PYTHON_RULES[with_indices] = pool_with_indices


def _adaptive_max_pool(dims: int) -> None:
    with_indices = getattr(F, f"adaptive_max_pool{dims}d_with_indices")

    def pool(input: ComplexPair, output_size: Any, return_indices: bool = False) -> Any:
        values, indices = with_indices(input.re, output_size)
        found = gathered(input, values, indices, dims)
        return (found, indices) if return_indices else found

    def pool_with_indices(input: ComplexPair, output_size: Any, return_indices: bool = True) -> Any:
        return pool(input, output_size, True)

    rule(f"adaptive_max_pool{dims}d")(pool_with_indices)
    PYTHON_RULES[getattr(F, f"adaptive_max_pool{dims}d")] = pool
    PYTHON_RULES[with_indices] = pool_with_indices


for _dims in (1, 2, 3):
    _max_pool(_dims)
    _adaptive_max_pool(_dims)


# --- dropout ---------------------------------------------------------------------------------------------------------


def _dropout(name: str) -> None:
    draw = getattr(torch, name)

    def dropout(input: ComplexPair, p: float = 0.5, train: bool = True) -> Any:
        """The mask is what the real function makes of ones: it draws the same random numbers."""
        if not train or p == 0:
            return input
        return input * draw(torch.ones_like(input.re.detach()), p, True)

    rule(name)(dropout)


def _alpha_dropout(name: str) -> None:
    draw = getattr(torch, name)

    def dropout(input: ComplexPair, p: float = 0.5, train: bool = True) -> Any:
        """az + b with random a and b, both from one drawing."""
        if not train or p == 0:
            return input
        both = []
        state = torch.get_rng_state()
        for fill in (0.0, 1.0):
            torch.set_rng_state(state)
            both.append(draw(torch.full_like(input.re.detach(), fill), p, True))
        return both[0] + input * (both[1] - both[0])

    rule(name)(dropout)


for _name in ("dropout", "feature_dropout"):
    _dropout(_name)
for _name in ("alpha_dropout", "feature_alpha_dropout"):
    _alpha_dropout(_name)


@rule("native_dropout")
def native_dropout(input: ComplexPair, p: float, train: bool | None) -> Any:
    """As `dropout`, with the mask."""
    out, mask = torch.native_dropout(torch.ones_like(input.re.detach()), p, train)
    return input * out, mask


# --- normalizations --------------------------------------------------------------------------------------------------


def normalized(input: Any, dims: Sequence[int], eps: float) -> Any:
    """(z − mean)/√(variance + eps)."""
    centred = input - input.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


def scaled(z: Any, weight: Any, bias: Any, shape: Sequence[int] | None = None) -> Any:
    """zw + b, with w and b in a shape that fits."""
    for term, apply in ((weight, torch.mul), (bias, torch.add)):
        if term is not None:
            z = apply(z, term if shape is None else term.reshape(shape))
    return z


@rule("layer_norm")
def layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *args: Any
) -> Any:
    """Over the last dimensions."""
    z = _moving(input, weight, bias)
    return scaled(normalized(z, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


@rule("rms_norm")
def rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """z/√(mean of z² + eps) over the last dimensions."""
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    z = _moving(input, weight)
    square = (z * z).mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    return scaled(z * torch.rsqrt(square + eps), weight, None)


@rule("group_norm")
def group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *args: Any) -> Any:
    """Over groups of channels."""
    z = _moving(input, weight, bias).reshape(input.shape[0], num_groups, -1)
    return scaled(normalized(z, [-1], eps).reshape(input.shape), weight, bias, _channels(input))


def _moving(input: Any, *others: Any) -> Any:
    """The input as a pair: the weights may move while it does not."""
    return input if is_pair(input) else ComplexPair(input, torch.zeros_like(input))


def _channels(input: Tensor) -> list[int]:
    return [1, -1, *[1] * (input.dim() - 2)]


@rule("batch_norm")
def batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *args: Any,
) -> Any:
    """Over all but the channels: by the batch's moments in training, else by the running ones.

    The running moments follow the real part, in the copies a product works on.
    """
    shape = _channels(input)
    z = _moving(input, weight, bias)
    if not training:
        z = (z - running_mean.reshape(shape)) * torch.rsqrt(running_var.reshape(shape) + eps)
        return scaled(z, weight, bias, shape)
    dims = [d for d in range(input.dim()) if d != 1]
    if running_mean is not None and not is_pair(running_mean):
        with torch.no_grad():
            variance, mean = torch.var_mean(z.re, dims)
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(variance.to(running_var.dtype), momentum)
    return scaled(normalized(z, dims, eps), weight, bias, shape)


@rule("instance_norm")
def instance_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *args: Any,
) -> Any:
    """Over the positions of each channel of each sample, or by running moments."""
    if not use_input_stats:
        return batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)
    z = _moving(input, weight, bias)
    if running_mean is not None:
        with torch.no_grad():
            variance, mean = torch.var_mean(z.re, list(range(2, input.dim())))
            running_mean.lerp_(mean.mean(0), momentum)
            running_var.lerp_(variance.mean(0), momentum)
    return scaled(normalized(z, list(range(2, input.dim())), eps), weight, bias, _channels(input))


# --- attention -------------------------------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(QKᵀ/√d + mask) V."""
    factor = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = (query * factor) @ (key * factor).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~re(attn_mask), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1)
    if attn_mask is not None:  # a row without any allowed entry is zero
        weights = torch.where((re(scores) == -math.inf).all(-1, keepdim=True), 0.0, weights)
    return torch.dropout(weights, dropout_p, True) @ value if dropout_p > 0 else weights @ value


# --- derivatives taken by the closure --------------------------------------------------------------------------------


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """`torch.autograd.grad` inside of the closure: dz/dx = ∂Re z/∂Re x + i ∂Im z/∂Re x.

    Without `create_graph` the result is a constant, that of the real parts.
    """
    z = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    x = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    given = [grad_outputs] if grad_outputs is None or isinstance(grad_outputs, Tensor) else list(grad_outputs)
    given = given if len(given) == len(z) else [None] * len(z)
    c = [torch.ones_like(re(a)) if b is None else b for a, b in zip(z, given, strict=True)]
    keep = bool(create_graph if retain_graph is None else retain_graph)

    def pull(part: Callable[[Any], Any], weight: Callable[[Any], Any], last: bool) -> list[Tensor | None]:
        pairs = [(part(a), weight(b)) for a, b in zip(z, c, strict=True)]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None and a.requires_grad]
        if not pairs:
            return [None] * len(x)
        tensors, weights = [a for a, _ in pairs], [b for _, b in pairs]
        graph = {"retain_graph": keep or not last, "create_graph": create_graph, "allow_unused": True}
        return list(torch.autograd.grad(tensors, re(x), weights, **graph))

    real = pull(re, re, last=not create_graph)
    if not allow_unused and not materialize_grads and any(g is None for g in real):
        torch.autograd.grad(re(z), re(x), re(c), retain_graph=True)  # says what is unused
    if not create_graph:
        return tuple(
            torch.zeros_like(re(a)) if g is None and materialize_grads else g for a, g in zip(x, real, strict=True)
        )
    moved = pull(_imaginary, re, last=False)
    turned = pull(re, _imaginary, last=True)
    return tuple(_joined(*parts, materialize_grads) for parts in zip(x, real, moved, turned, strict=True))


def _imaginary(value: Any) -> Tensor | None:
    return value.im if isinstance(value, ComplexPair) else None


def _joined(x: Any, real: Tensor | None, moved: Tensor | None, turned: Tensor | None, fill: bool) -> Any:
    if real is None:
        return torch.zeros_like(re(x)) if fill else None
    parts = [part for part in (moved, turned) if part is not None]
    return ComplexPair(real, sum(parts[1:], parts[0])) if parts else real


PYTHON_RULES[torch.autograd.grad] = grad
