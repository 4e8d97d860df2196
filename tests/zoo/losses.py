"""Every loss, with every reduction and argument, behind one linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.problem import Problem, integers, problem, uniform

LABELS = torch.tensor([0, 2, 1, 2])
SOME_IGNORED = torch.tensor([0, -100, 1, 2])
IMAGE_LABELS = integers(3, 2, 2, 3)
PROBABILITIES = uniform(4, 3).softmax(1)
TARGETS = uniform(4, 3, low=0.1, high=0.9)
FAR_TARGETS = uniform(4, 3, low=-3.0, high=3.0)
COUNTS = integers(4, 4, 3).float()
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0])
VARIANCES = uniform(4, 3, low=0.5, high=2.0)

VECTOR, IMAGE, ONE = (4, 3), (2, 3, 2, 3), (3,)


def _as(x: Tensor, z: Tensor) -> Tensor:
    return x.to(z.dtype)


# name: (shape of z, loss of z and reduction)
LOSSES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, str], Tensor]]] = {
    "cross_entropy": (VECTOR, lambda z, r: F.cross_entropy(z, LABELS, reduction=r)),
    "cross_entropy-module": (VECTOR, lambda z, r: nn.CrossEntropyLoss(reduction=r)(z, LABELS)),
    "cross_entropy-weight": (
        VECTOR,
        lambda z, r: F.cross_entropy(z, LABELS, _as(CLASS_WEIGHTS, z), reduction=r),
    ),
    "cross_entropy-ignore_index": (VECTOR, lambda z, r: F.cross_entropy(z, SOME_IGNORED, reduction=r)),
    "cross_entropy-ignore_class": (
        VECTOR,
        lambda z, r: F.cross_entropy(z, LABELS, ignore_index=2, reduction=r),
    ),
    "cross_entropy-smoothing": (
        VECTOR,
        lambda z, r: F.cross_entropy(z, LABELS, label_smoothing=0.1, reduction=r),
    ),
    "cross_entropy-everything": (
        VECTOR,
        lambda z, r: F.cross_entropy(
            z, SOME_IGNORED, weight=_as(CLASS_WEIGHTS, z), label_smoothing=0.2, ignore_index=-100, reduction=r
        ),
    ),
    "cross_entropy-soft": (VECTOR, lambda z, r: F.cross_entropy(z, _as(PROBABILITIES, z), reduction=r)),
    "cross_entropy-soft-weight-smoothing": (
        VECTOR,
        lambda z, r: F.cross_entropy(z, _as(PROBABILITIES, z), _as(CLASS_WEIGHTS, z), label_smoothing=0.1, reduction=r),
    ),
    "cross_entropy-image": (IMAGE, lambda z, r: F.cross_entropy(z, IMAGE_LABELS, reduction=r)),
    "cross_entropy-image-weight-ignore": (
        IMAGE,
        lambda z, r: F.cross_entropy(z, IMAGE_LABELS, _as(CLASS_WEIGHTS, z), ignore_index=1, reduction=r),
    ),
    "cross_entropy-image-soft": (
        IMAGE,
        lambda z, r: F.cross_entropy(z, z.detach().cos().softmax(1), reduction=r),
    ),
    "cross_entropy-one": (ONE, lambda z, r: F.cross_entropy(z, torch.tensor(2), reduction=r)),
    "nll": (VECTOR, lambda z, r: F.nll_loss(F.log_softmax(z, 1), LABELS, reduction=r)),
    "nll-weight-ignore": (
        VECTOR,
        lambda z, r: F.nll_loss(z.log_softmax(1), SOME_IGNORED, _as(CLASS_WEIGHTS, z), reduction=r),
    ),
    "nll-module-image": (IMAGE, lambda z, r: nn.NLLLoss(reduction=r)(nn.LogSoftmax(1)(z), IMAGE_LABELS)),
    "nll-log-of-softmax": (
        VECTOR,
        lambda z, r: F.nll_loss(torch.log(z.softmax(1) + 1e-12), LABELS, reduction=r),
    ),
    "kl_div": (VECTOR, lambda z, r: F.kl_div(F.log_softmax(z, 1), _as(PROBABILITIES, z), reduction=r)),
    "kl_div-log_target": (
        VECTOR,
        lambda z, r: nn.KLDivLoss(reduction=r, log_target=True)(torch.log_softmax(z, 1), _as(PROBABILITIES, z).log()),
    ),
    "binary_cross_entropy_with_logits": (
        VECTOR,
        lambda z, r: F.binary_cross_entropy_with_logits(z, _as(TARGETS, z), reduction=r),
    ),
    "binary_cross_entropy_with_logits-weights": (
        VECTOR,
        lambda z, r: nn.BCEWithLogitsLoss(_as(VARIANCES, z), reduction=r, pos_weight=_as(CLASS_WEIGHTS, z))(
            z, _as(TARGETS, z)
        ),
    ),
    "binary_cross_entropy": (
        VECTOR,
        lambda z, r: F.binary_cross_entropy(torch.sigmoid(z), _as(TARGETS, z), reduction=r),
    ),
    "binary_cross_entropy-weight": (
        VECTOR,
        lambda z, r: nn.BCELoss(_as(VARIANCES, z), reduction=r)(nn.Sigmoid()(z), _as(TARGETS, z)),
    ),
    "mse": (VECTOR, lambda z, r: F.mse_loss(z, _as(TARGETS, z), reduction=r)),
    "mse-module-image": (IMAGE, lambda z, r: nn.MSELoss(reduction=r)(z, z.detach().cos())),
    "mse-weight": (
        VECTOR,
        lambda z, r: F.mse_loss(z, _as(TARGETS, z), reduction=r, weight=_as(VARIANCES, z)),
    ),
    "huber": (VECTOR, lambda z, r: F.huber_loss(z, _as(FAR_TARGETS, z), reduction=r, delta=0.7)),
    "smooth_l1": (VECTOR, lambda z, r: nn.SmoothL1Loss(reduction=r, beta=0.7)(z, _as(FAR_TARGETS, z))),
    "poisson": (VECTOR, lambda z, r: F.poisson_nll_loss(z, _as(COUNTS, z), reduction=r)),
    "poisson-full": (VECTOR, lambda z, r: F.poisson_nll_loss(z, _as(COUNTS, z), full=True, reduction=r)),
    "gaussian": (
        VECTOR,
        lambda z, r: nn.GaussianNLLLoss(reduction=r, full=True)(z, _as(TARGETS, z), _as(VARIANCES, z)),
    ),
    "soft_margin": (VECTOR, lambda z, r: F.soft_margin_loss(z, _as(TARGETS, z).sub(0.5).sign(), reduction=r)),
}


def _weighted_mean(losses: Tensor) -> Tensor:
    w = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view_as(losses)
    return (w * losses).sum() / w.sum()


def build_loss(
    shape: tuple[int, ...], loss: Callable[[Tensor, str], Tensor], reduction: str, dtype: torch.dtype
) -> Problem:
    """One linear layer with a loss behind it; reduction "none" is followed by a weighted mean by hand."""
    torch.manual_seed(1)
    layer = nn.Linear(2, math.prod(shape) // shape[0]).to(dtype)
    x = uniform(shape[0], 2).to(dtype)
    if len(shape) == 1:
        layer, x = nn.Linear(2, shape[0]).to(dtype), x[0]

    def reduced(z: Tensor) -> Tensor:
        value = loss(z, reduction)
        return _weighted_mean(value) if reduction == "none" else value

    return problem(layer, lambda: [layer(x).view(shape)], reduced)
