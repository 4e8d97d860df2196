"""Layer normalization in Jᵀu: a derivative in u for the price of two kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

_NODE = "NativeLayerNormBackward0"


@dataclass(frozen=True)
class LayerNormCall:
    """One call y = w ⊙ x̂ + b of `layer_norm`, with the node that takes its gradient; `weight` None stands for ones."""

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
        used = [t for t in (x, w, output) if t is not None]
        plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == output.dtype for t in used)
        if node is None or node.name() != _NODE or not plain or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return None
        return cls(node, x.detach(), tuple(given["normalized_shape"]), None if w is None else w.detach(), given["eps"])

    def gradient(
        self, found: tuple[Tensor | None, ...], above: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        """The hook of the node: the gradients it has found, as functions of the one above it alone."""
        if above[0] is None or not above[0].requires_grad:
            return None
        parts = [None if g is None else g.detach() for g in found]
        return _adjoint(above[0], self.input, self.weight, self.shape, self.eps, *parts)


class _Adjoint(torch.autograd.Function):
    """g ↦ (∂⟨y, g⟩/∂x, ∂⟨y, g⟩/∂w, ∂⟨y, g⟩/∂b), linear in g, at values that are known.

    Its transpose takes (ẋ, ẇ, ḃ) to ẏ = w ⊙ Pẋ + ẇ ⊙ x̂ + ḃ. P = ∂x̂/∂x is symmetric, hence the backward kernel itself.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, shape: tuple[int, ...], eps: float, *found: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The values that are known."""
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.eps = shape, eps
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> tuple[Tensor | None, ...]:
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


_adjoint: Callable[..., tuple[Tensor | None, ...]] = _Adjoint.apply


@contextmanager
def at_known_values(calls: Sequence[LayerNormCall]) -> Iterator[None]:
    """Let a backward pass with `create_graph` take these calls as functions of the gradient that comes in alone.

    Their second derivative in x and w, which a Jacobian has no use for, is what most of the time would go to: autograd
    computes it whether it is asked for or not.
    """
    hooks = [call.node.register_hook(call.gradient) for call in calls]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
