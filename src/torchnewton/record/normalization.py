"""Layer normalization in Jᵀu: a derivative in u for the price of two kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from torchnewton.record.known_values import Gradients, KnownCall, are_plain


@dataclass(frozen=True)
class LayerNormCall(KnownCall):
    """One call y = w ⊙ x̂ + b of `layer_norm`; `weight` None stands for ones."""

    node: Node
    input: Tensor
    shape: tuple[int, ...]
    weight: Tensor | None
    eps: float

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> LayerNormCall | None:
        """The call of `torch.nn.functional.layer_norm`; None where another kernel or another type of tensor ran."""
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        given = {"weight": None, "eps": 1e-5, **dict(zip(names, args, strict=False)), **kwargs}
        x, w, node = given["input"], given["weight"], output.grad_fn
        if node is None or node.name() != "NativeLayerNormBackward0" or not are_plain(output, x, w):
            return None
        return cls(node, x.detach(), tuple(given["normalized_shape"]), None if w is None else w.detach(), given["eps"])

    def adjoint(self, above: Tensor, found: Gradients) -> Gradients:
        """See `KnownCall.adjoint`."""
        return _adjoint(above, self.input, self.weight, self.shape, self.eps, *found)


class _Adjoint(torch.autograd.Function):
    """g ↦ (∂⟨y, g⟩/∂x, ∂⟨y, g⟩/∂w, ∂⟨y, g⟩/∂b), linear in g, at values that are known.

    Its transpose takes (ẋ, ẇ, ḃ) to ẏ = w ⊙ Pẋ + ẇ ⊙ x̂ + ḃ. P = ∂x̂/∂x is symmetric, hence the backward kernel itself.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, shape: tuple[int, ...], eps: float, *found: Tensor | None
    ) -> Gradients:
        """The values that are known."""
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.eps = shape, eps
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Gradients:
        """The transpose: the forward kernel with ẇ and ḃ, and the backward kernel."""
        x, weight = ctx.saved_tensors
        scale = x.new_zeros(ctx.shape) if dw is None else dw
        y, mean, rstd = torch.native_layer_norm(x, ctx.shape, scale, db, ctx.eps)
        if dx is not None:
            (p, _, _) = torch.ops.aten.native_layer_norm_backward(
                dx.contiguous(), x, ctx.shape, mean, rstd, None, None, [True, False, False]
            )
            y += p if weight is None else p * weight
        return (y, *[None] * 7)


_adjoint: Callable[..., Gradients] = _Adjoint.apply
