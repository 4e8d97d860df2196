"""Linear layers in Jᵀu: a derivative in u in two matrix products that add up in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from torchnewton.record.known_values import Gradients, KnownCall, are_plain

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0")  # of the batch of an input with more than two dimensions
_PRODUCTS = ("AddmmBackward0", "MmBackward0")
SMALLEST = 2**16  # entries of y: with fewer, calls from Python take longer than the additions they save


@dataclass(frozen=True)
class LinearCall(KnownCall):
    """The product y = b + xm of one call of `linear`: x the input, N × I, and m the weight's transpose, I × O."""

    node: Node
    input: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> LinearCall | None:
        """The call of `torch.nn.functional.linear`; None for a small one, another kernel or another type of tensor."""
        if output.numel() < SMALLEST:
            return None
        given = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs)
        x, w, node = given["input"], given["weight"], output.grad_fn
        if node is not None and node.name() in _VIEWS:
            node = node.next_functions[0][0]
        flat = x.dim() == 2 or x.is_contiguous()
        if node is None or node.name() not in _PRODUCTS or not flat or not are_plain(output, x, w):
            return None
        return cls(node, x.detach().reshape(-1, x.shape[-1]), w.detach().mT)

    def adjoint(self, above: Tensor, found: Gradients) -> Gradients:
        """See `KnownCall.adjoint`; the node knows the bias as the first of three, or knows none."""
        bias = found[:-2] if len(found) > 2 else (None,)
        parts = _adjoint(above, self.input, self.matrix, *bias, *found[-2:])
        return parts if len(found) > 2 else parts[1:]


class _Adjoint(torch.autograd.Function):
    """g ↦ (g, g mᵀ, xᵀg), linear in g, at values that are known.

    Its transpose takes (ḃ, ẋ, ṁ) to ẏ = ḃ + ẋm + xṁ. Autograd adds up its three terms in memory of their own.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, matrix: Tensor, *found: Tensor | None) -> Gradients:
        """The values that are known."""
        ctx.save_for_backward(x, matrix)
        ctx.shape = g.shape
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, db: Tensor | None, dx: Tensor | None, dm: Tensor | None) -> Gradients:
        """The transpose."""
        x, matrix = ctx.saved_tensors
        y = broadcast = None if db is None else db.expand(ctx.shape)
        for left, right in ((x, dm), (dx, matrix)):
            if left is not None and right is not None:
                y = _plus_product(y, left, right, in_place=y is not broadcast)
        return (y, *[None] * 5)


def _plus_product(y: Tensor | None, left: Tensor, right: Tensor, in_place: bool) -> Tensor:
    if y is None:
        return left @ right
    return y.addmm_(left, right) if in_place else torch.addmm(y, left, right)


_adjoint: Callable[..., Gradients] = _Adjoint.apply
