"""Losses, from their formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.complex_step.pair import re, rule

_NONE, _MEAN, _SUM = 0, 1, 2


def reduced(loss: Any, reduction: int | str) -> Any:
    """The mean, the sum or all of them."""
    if reduction in (_MEAN, "mean"):
        return loss.mean()
    return loss.sum() if reduction in (_SUM, "sum") else loss


@rule("cross_entropy_loss")
def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """−log softmax at the labels, or against probabilities; the softmax is shifted by the greatest real part."""
    axis = 0 if input.dim() == 1 else 1
    logs = torch.log_softmax(input, axis)
    if target.is_floating_point():
        return _soft(logs, target, weight, reduction, label_smoothing, axis)
    hard = F.nll_loss(logs, target, weight, reduction=("none", "mean", "sum")[reduction], ignore_index=ignore_index)
    if not label_smoothing:
        return hard
    shape = [-1 if d == axis else 1 for d in range(input.dim())]
    smooth = -(logs if weight is None else logs * weight.reshape(shape)).sum(axis)
    ignored = target == ignore_index
    smooth = smooth.masked_fill(ignored, 0.0)
    if reduction == _MEAN:
        counted = (~ignored).to(input.dtype) if weight is None else weight[target.masked_fill(ignored, 0)] * ~ignored
        smooth = smooth.sum() / counted.sum()
    elif reduction == _SUM:
        smooth = smooth.sum()
    return (1 - label_smoothing) * hard + label_smoothing / input.shape[axis] * smooth


def _soft(logs: Any, target: Any, weight: Any, reduction: int, smoothing: float, axis: int) -> Any:
    if smoothing:
        target = target * (1 - smoothing) + smoothing / logs.shape[axis]
    if weight is not None:
        target = target * weight.reshape([-1 if d == axis else 1 for d in range(logs.dim())])
    losses = -(logs * target).sum(axis)
    if reduction == _MEAN:
        return losses.sum() / (logs.numel() // logs.shape[axis])
    return losses.sum() if reduction == _SUM else losses


@rule("mse_loss")
def mse_loss(input: Any, target: Any, reduction: int = _MEAN) -> Any:
    """(z − t)²."""
    return reduced((input - target).square(), reduction)


@rule("l1_loss")
def l1_loss(input: Any, target: Any, reduction: int = _MEAN) -> Any:
    """|z − t|."""
    return reduced((input - target).abs(), reduction)


@rule("huber_loss")
def huber_loss(input: Any, target: Any, reduction: int = _MEAN, delta: float = 1.0) -> Any:
    """½d² within ±δ, else δ(|d| − ½δ)."""
    d = (input - target).abs()
    return reduced(torch.where(re(d) < delta, 0.5 * d.square(), delta * (d - 0.5 * delta)), reduction)


@rule("smooth_l1_loss")
def smooth_l1_loss(input: Any, target: Any, reduction: int = _MEAN, beta: float = 1.0) -> Any:
    """½d²/β within ±β, else |d| − ½β."""
    if beta == 0:
        return l1_loss(input, target, reduction)
    d = (input - target).abs()
    return reduced(torch.where(re(d) < beta, d.square() * (0.5 / beta), d - 0.5 * beta), reduction)


@rule("binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(
    input: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = _MEAN
) -> Any:
    """(1 − t)z − (1 + (p − 1)t) log σ(z)."""
    factor = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    losses = (1 - target) * input - factor * F.logsigmoid(input)
    return reduced(losses if weight is None else losses * weight, reduction)


@rule("binary_cross_entropy")
def binary_cross_entropy(input: Any, target: Any, weight: Any = None, reduction: int = _MEAN) -> Any:
    """−t log p − (1 − t) log(1 − p), the logarithms at least −100."""
    losses = (target - 1) * torch.log1p(-input).clamp_min(-100) - target * torch.log(input).clamp_min(-100)
    return reduced(losses if weight is None else losses * weight, reduction)


@rule("kl_div")
def kl_div(input: Any, target: Any, reduction: int = _MEAN, *, log_target: bool = False) -> Any:
    """t(log t − z)."""
    losses = torch.exp(target) * (target - input) if log_target else torch.xlogy(target, target) - target * input
    return reduced(losses, reduction)


@rule("poisson_nll_loss")
def poisson_nll_loss(input: Any, target: Any, log_input: bool, full: bool, eps: float, reduction: int) -> Any:
    """exp z − tz, or z − t log(z + eps); with Stirling's terms of t > 1."""
    losses = torch.exp(input) - target * input if log_input else input - target * torch.log(input + eps)
    if full:
        t = torch.where(re(target) > 1, target, 1.0)
        stirling = t * torch.log(t) - t + 0.5 * torch.log(2 * math.pi * t)
        losses = losses + torch.where(re(target) > 1, stirling, 0.0)
    return reduced(losses, reduction)


@rule("soft_margin_loss")
def soft_margin_loss(input: Any, target: Any, reduction: int = _MEAN) -> Any:
    """log(1 + exp(−tz))."""
    return reduced(-F.logsigmoid(target * input), reduction)


@rule("hinge_embedding_loss")
def hinge_embedding_loss(input: Any, target: Tensor, margin: float = 1.0, reduction: int = _MEAN) -> Any:
    """z where t = 1, max(0, margin − z) where t = −1."""
    losses = torch.where(target == 1, input, 0.0) + torch.where(target == -1, (margin - input).clamp_min(0), 0.0)
    return reduced(losses, reduction)


@rule("margin_ranking_loss")
def margin_ranking_loss(input1: Any, input2: Any, target: Any, margin: float = 0.0, reduction: int = _MEAN) -> Any:
    """max(0, margin − t(z₁ − z₂))."""
    return reduced((margin - target * (input1 - input2)).clamp_min(0), reduction)


@rule("cosine_embedding_loss")
def cosine_embedding_loss(input1: Any, input2: Any, target: Tensor, margin: float = 0.0, reduction: int = _MEAN) -> Any:
    """1 − cos where t = 1, max(0, cos − margin) where t = −1."""
    norms = ((input1 * input1).sum(-1) + 1e-12) * ((input2 * input2).sum(-1) + 1e-12)
    cosine: Any = (input1 * input2).sum(-1) / norms.sqrt()
    losses = torch.where(target == 1, 1 - cosine, 0.0) + torch.where(target == -1, (cosine - margin).clamp_min(0), 0.0)
    return reduced(losses, reduction)


@rule("triplet_margin_loss")
def triplet_margin_loss(
    anchor: Any, positive: Any, negative: Any, margin: float = 1.0, p: float = 2.0, eps: float = 1e-6,
    swap: bool = False, reduction: int = _MEAN,
) -> Any:  # fmt: skip
    """max(0, margin + d(a, p) − d(a, n))."""
    near, far = F.pairwise_distance(anchor, positive, p, eps), F.pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, F.pairwise_distance(positive, negative, p, eps))
    return reduced((margin + near - far).clamp_min(0), reduction)


@rule("multi_margin_loss")
def multi_margin_loss(
    input: Any, target: Tensor, p: float = 1, margin: float = 1.0, weight: Any = None, reduction: int = _MEAN
) -> Any:
    """Σ max(0, margin − z_t + z_j)ᵖ / C over the other classes."""
    z, t = (input.unsqueeze(0), target.reshape(1)) if input.dim() == 1 else (input, target)
    own = t.unsqueeze(1)
    gap: Any = (margin - z.gather(1, own) + z).clamp_min(0) ** p
    if weight is not None:
        gap = gap * weight[t].unsqueeze(1)
    others = torch.ones_like(re(z)).scatter(1, own, 0.0)
    losses = (gap * others).sum(1) / z.shape[1]
    return reduced(losses if input.dim() > 1 else losses[0], reduction)
