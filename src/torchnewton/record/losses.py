"""Which calls of torch are losses, and where each of them splits: loss = ℓ(z)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from torchnewton.record.graph import kind_of

Function = Callable[..., Any]
Activations = Mapping[Node, tuple[Function, Tensor]]  # by the node of its result: a call and its input


@dataclass(frozen=True)
class LossRule:
    """How a loss call splits.

    `arguments` are the names of its leading arguments that count as outputs z; ℓ is convex in all of them together.
    `activations`, where given, are the functions whose input is the better split: a loss that is linear in a
    log-probability has no curvature there, so z is the input of the log-softmax that feeds it. Behind anything else,
    as the logarithm of a mixture of softmaxes, ℓ need not be convex in z: there a `linear` loss has no split.
    """

    arguments: tuple[str, ...] = ("input",)
    activations: frozenset[Function] = frozenset()
    linear: bool = False


SOFTMAX: frozenset[Function] = frozenset(
    {F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softmax, torch.softmax, Tensor.softmax}
)
SIGMOID: frozenset[Function] = frozenset({F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit})
ACTIVATIONS = SOFTMAX | SIGMOID

GUARD = 1e-6  # up to which log(p + GUARD) counts as log(p): what is convex of it ends near p = GUARD
_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_VIEWS = """Alias AsStrided Clone Diagonal Expand Flip Gather Index IndexSelect MaskedSelect Permute Repeat ReshapeAlias
 Roll Select Slice Split SplitWithSizes Squeeze T Take ToCopy Transpose Unbind Unfold UnsafeSplit UnsafeView Unsqueeze
 View Redistribute _FromTorchTensor _ToTorchTensor"""
_VIEW_NODES = frozenset(_VIEWS.split())
_CLAMPS = {"Clamp", "ClampMax", "ClampMin"}
_SUMS = {"Mean", "Sum"}  # of logarithms
_LINEAR = "Add Addcmul Cat Cumsum Div Dot MaskedFill Mul Nansum Neg Rsub Stack Sub Where"
LINEAR_NODES = _VIEW_NODES | _SUMS | frozenset(_LINEAR.split())

_BOTH = LossRule(("input", "target"))
LOSSES: Mapping[Function, LossRule] = {
    F.cross_entropy: LossRule(),
    F.mse_loss: _BOTH,
    F.huber_loss: _BOTH,
    F.smooth_l1_loss: _BOTH,
    F.binary_cross_entropy_with_logits: LossRule(),
    F.poisson_nll_loss: LossRule(),
    F.gaussian_nll_loss: LossRule(),
    F.soft_margin_loss: LossRule(),
    F.nll_loss: LossRule(activations=SOFTMAX, linear=True),
    F.kl_div: LossRule(activations=SOFTMAX, linear=True),
    F.binary_cross_entropy: LossRule(activations=SIGMOID),
}


def split_inputs(
    rule: LossRule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    activations: Activations,
) -> list[Tensor]:
    """The tensors z of one loss call: its differentiable arguments, or the input of the activation that feeds it."""
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(rule.arguments)]
    tensors = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    if not rule.activations or not tensors:
        return tensors
    source = activation_behind(tensors[0], rule.activations, activations)
    if source is not None:
        return [source]
    return [] if rule.linear else tensors


def divisor(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """D with ℓ = Σ/D, where Σ sums the entries that the same loss call has with reduction="none"; 1 unless it averages.

    A mean over classes counts what torch counts: samples that are not ignored, by the weights of their classes.
    """
    given = _bound(function, args, kwargs)
    kind = reduction(function, args, kwargs)
    if kind in ("sum", "none"):
        return 1.0
    z, target, weight = given["input"], given["target"], given.get("weight")
    if kind == "batchmean":
        return float(z.shape[0])
    if function in (F.cross_entropy, F.nll_loss):
        if target.is_floating_point():
            return float(z.numel() / z.shape[min(1, z.dim() - 1)])
        kept = target != given["ignore_index"]
        return float(kept.sum() if weight is None else weight[target[kept]].sum())
    if function is F.mse_loss and weight is not None:
        return float(weight.sum())
    return float(torch.broadcast_shapes(z.shape, target.shape).numel())


def num_samples(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """How many samples a loss call takes: those not ignored, or the distributions over classes, where it has classes.

    Else the first dimension of its entries.
    """
    given = _bound(function, args, kwargs)
    z, target = given["input"], given["target"]
    if function is F.kl_div:
        return float(z.detach().double().exp().sum())  # a 1 for each, whichever dimension the classes have
    if function not in (F.cross_entropy, F.nll_loss):
        return float([*torch.broadcast_shapes(z.shape, target.shape), 1][0])
    if target.is_floating_point():
        return float(z.numel() / z.shape[min(1, z.dim() - 1)])
    return float((target != given["ignore_index"]).sum())


def reduction(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """How a loss call makes one number of its entries: "mean", "batchmean", "sum", "none"."""
    given = _bound(function, args, kwargs)
    if given.get("reduce") is False:
        return "none"
    return "sum" if given.get("size_average") is False else str(given["reduction"])


def _bound(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def is_guard(function: Function, args: Sequence[Any]) -> bool:
    """Whether a call adds a constant that keeps a logarithm finite, as in log(softmax(z) + 1e-12)."""
    return function in _ADDITIONS and len(args) == 2 and isinstance(args[1], float) and 0 <= args[1] <= GUARD


def activation_behind(
    tensor: Tensor, wanted: frozenset[Function], activations: Activations, logs: int = 0
) -> Tensor | None:
    """Follow what leaves the loss convex back from `tensor` to a wanted activation's input: views, selections, copies,
    casts, clamps (which only take curvature away), over a softmax one logarithm, and sums of logarithms.

    `logs` is the number of logarithms in front of `tensor`; those of a binary cross entropy count for none.
    """
    node, needed, sums = tensor.grad_fn, logs, False
    while node is not None:
        if node in activations and activations[node][0] in wanted:
            function, source = activations[node]
            if function in SIGMOID:
                return None if sums or logs != needed else source
            return source if logs == (function.__name__ == "softmax") else None
        kind = kind_of(node)
        logs += kind == "Log"
        sums |= kind in _SUMS
        known = kind == "Log" or kind in _VIEW_NODES or kind in _CLAMPS or (kind in _SUMS and logs == 0)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if len(parents) == 1 and known else None
    return None
