"""Convolutions in Jᵀu: a derivative in u for the price of two convolutions, where autograd makes four."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from torchnewton.record.known_values import Gradients, KnownCall, are_plain

CONVOLUTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
_GEOMETRY = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")


@dataclass(frozen=True)
class ConvolutionCall(KnownCall):
    """One call y = x ∗ w + b of a convolution; `geometry` as `torch.convolution` takes it."""

    node: Node
    input: Tensor
    weight: Tensor
    geometry: tuple[Any, ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> ConvolutionCall | None:
        """The call of one of `CONVOLUTIONS`; None where another kernel, type of tensor or input ran."""
        names = ("input", "weight", "bias", "stride", "padding")
        given = {"padding": 0, **dict(zip(names, args, strict=False)), **kwargs}
        x, w, node = given["input"], given["weight"], output.grad_fn
        pads_one_side = given["padding"] == "same" and any(size % 2 == 0 for size in w.shape[2:])  # a padded copy of x
        if node is None or node.name() != "ConvolutionBackward0" or pads_one_side or not are_plain(output, x, w):
            return None
        return cls(node, x.detach(), w.detach(), tuple(getattr(node, f"_saved_{name}") for name in _GEOMETRY))

    def adjoint(self, above: Tensor, found: Gradients) -> Gradients:
        """See `KnownCall.adjoint`."""
        return _adjoint(above, self.input, self.weight, self.geometry, *found)


class _Adjoint(torch.autograd.Function):
    """g ↦ (∂⟨y, g⟩/∂x, ∂⟨y, g⟩/∂w, ∂⟨y, g⟩/∂b), linear in g, at values that are known.

    Its transpose takes (ẋ, ẇ, ḃ) to ẏ = ẋ ∗ w + x ∗ ẇ + ḃ.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], *found: Tensor | None
    ) -> Gradients:
        """The values that are known."""
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.shape = geometry, g.shape
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Gradients:
        """The transpose: a convolution each for ẋ and ẇ, ḃ with one of them."""
        x, weight = ctx.saved_tensors
        y: Tensor | None = None
        for input, kernel in ((x, dw), (dx, weight)):
            if input is not None and kernel is not None:
                part = torch.convolution(input, kernel, db if y is None else None, *ctx.geometry)
                y = part if y is None else y.add_(part)
        if y is None and db is not None:
            y = db.view(-1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape)
        return (y, *[None] * 6)


_adjoint: Callable[..., Gradients] = _Adjoint.apply
