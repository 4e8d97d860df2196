"""Operations of the matrix products in one call of torch; anything else counts as none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Count = Callable[[Sequence[Any], Mapping[str, Any], torch.Size], float]


def _weight_first(args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Size) -> float:
    """2 · output entries · fan-in, for a weight of outputs × fan-in."""
    weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[1]
    return 2.0 * output.numel() * weight[:1].numel()


def _bilinear(args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Size) -> float:
    weight: Tensor = kwargs["weight"] if "weight" in kwargs else args[2]
    return 2.0 * output.numel() * weight[:1].numel()


def _transposed(args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Size) -> float:
    """2 · input entries · fan-out, for a weight of inputs × fan-out."""
    given: dict[str, Tensor] = {**dict(zip(("input", "weight"), args, strict=False)), **kwargs}
    return 2.0 * given["input"].numel() * given["weight"][:1].numel()


def _product(args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Size) -> float:
    """2 · output entries · columns of the first of the two last tensors."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return 2.0 * output.numel() * tensors[-2].shape[-1]


def _einsum(args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Size) -> float:
    """2 · output entries · sizes of the indices that are summed; 0 for an equation by numbers."""
    equation, *operands = args
    if not isinstance(equation, str):
        return 0.0
    operands = operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    left, arrow, right = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, x in zip(left.split(","), operands, strict=True):
        head, _, tail = term.partition("...")
        sizes.update(zip(head, x.shape, strict=False))
        sizes.update(zip(reversed(tail), reversed(x.shape), strict=False))
    summed = [n for letter, n in sizes.items() if (letter not in right if arrow else left.count(letter) > 1)]
    return 2.0 * output.numel() * math.prod(summed) if summed else 0.0


def _recurrent(args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Size) -> float:
    """2 · weights · samples · steps, in all layers and directions; a packed sequence has both in one dimension."""
    x: Tensor = args[0]
    weights: Sequence[Tensor] = [item for item in args if isinstance(item, (list, tuple))][-1]
    return 2.0 * x.shape[:-1].numel() * sum(w.numel() for w in weights if w.dim() == 2)


def _cell(args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Size) -> float:
    """2 · weights · samples."""
    x: Tensor = args[0]
    weights: Sequence[Tensor] = args[2:4]
    return 2.0 * x.shape[:-1].numel() * sum(w.numel() for w in weights)


def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Size) -> float:
    """The projections, and the products of all queries with all keys and of the scores with all values."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    inputs: list[Tensor] = [given["query"], given["key"], given["value"]]
    width: int = given["embed_dim_to_check"]
    projected = sum(2.0 * x.numel() * width for x in (*inputs, inputs[0]))
    return projected + 4.0 * inputs[0].numel() * inputs[1].shape[0]


_COUNTS: Mapping[Callable[..., Any], Count] = {
    **dict.fromkeys((F.linear, torch.conv1d, torch.conv2d, torch.conv3d), _weight_first),
    F.bilinear: _bilinear,
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed),
    **{
        getattr(owner, name): _product
        for owner in (torch, Tensor)
        for name in ("matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "addmv")
    },
    torch.einsum: _einsum,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell),
    F.multi_head_attention_forward: _attention,
}


def is_product(function: Callable[..., Any]) -> bool:
    """Whether calls of this function are matrix products."""
    return function in _COUNTS


def flops(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output_shape: torch.Size
) -> float:
    """Multiplications and additions of the matrix products in a call whose first output has this shape."""
    count = _COUNTS.get(function)
    return 0.0 if count is None else count(args, kwargs, output_shape)
