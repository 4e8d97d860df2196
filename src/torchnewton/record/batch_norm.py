"""Batch normalization in Jᵀu: a derivative in u for the price of two kernels, where autograd makes fifty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from torchnewton.record.known_values import Gradients, KnownCall, are_plain

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@dataclass(frozen=True)
class BatchNormCall(KnownCall):
    """One call y = w ⊙ x̂ + b of `batch_norm`; `weight` None stands for ones.

    `mean` and `variance` are those that x̂ is made with, None where they are those of x.
    """

    node: Node
    input: Tensor
    weight: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    eps: float

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> BatchNormCall | None:
        """The call of `torch.nn.functional.batch_norm`; None where another kernel or another type of tensor ran."""
        defaults = {"weight": None, "training": False, "eps": 1e-5}
        given = {**defaults, **dict(zip(_NAMES, args, strict=False)), **kwargs}
        x, w, node = given["input"], given["weight"], output.grad_fn
        if node is None or node.name() != "NativeBatchNormBackward0" or not are_plain(output, x, w):
            return None
        fixed = (None, None) if given["training"] else (given["running_mean"], given["running_var"])
        weight, mean, variance = (None if t is None else t.detach() for t in (w, *fixed))
        return cls(node, x.detach(), weight, mean, variance, given["eps"])

    def adjoint(self, above: Tensor, found: Gradients) -> Gradients:
        """See `KnownCall.adjoint`."""
        return _adjoint(above, self.input, self.weight, self.mean, self.variance, self.eps, *found)


class _Adjoint(torch.autograd.Function):
    """g ↦ (∂⟨y, g⟩/∂x, ∂⟨y, g⟩/∂w, ∂⟨y, g⟩/∂b), linear in g, at values that are known.

    Its transpose takes (ẋ, ẇ, ḃ) to ẏ = w ⊙ Pẋ + ẇ ⊙ x̂ + ḃ. P = ∂x̂/∂x is symmetric and treats channels apart, as w
    does: w ⊙ P is the backward kernel itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        eps: float,
        *found: Tensor | None,
    ) -> Gradients:
        """The values that are known."""
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Gradients:
        """The transpose: the forward kernel with ẇ and ḃ, and the backward kernel."""
        x, weight, mean, variance = ctx.saved_tensors
        scale = x.new_zeros(x.shape[1]) if dw is None else dw
        of_batch = mean is None
        y, *found = torch.native_batch_norm(x, scale, db, mean, variance, of_batch, 0.0, ctx.eps)
        if dx is not None:
            (p, _, _) = torch.ops.aten.native_batch_norm_backward(
                dx, x, weight, mean, variance, *found, of_batch, ctx.eps, [True, False, False]
            )
            y += p
        return (y, *[None] * 8)


_adjoint: Callable[..., Gradients] = _Adjoint.apply
