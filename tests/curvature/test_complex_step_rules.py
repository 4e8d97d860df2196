"""Every rule of the complex step against two reverse passes of autograd, from h = 1e-8 to 1e-100."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # of kl_div

Function = Callable[..., Any]


def numbers(*shape: int, low: float = -1.5, high: float = 1.5, seed: int = 0) -> Tensor:
    """Numbers that keep a distance to each other and to the kinks of the functions below."""
    count = int(torch.tensor(shape).prod())
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (low + (high - low) * (order.double() + 0.37) / count).reshape(shape)


A, B = numbers(3, 4), numbers(3, 4, seed=1)
POSITIVE, ONE = (numbers(3, 4, low=0.2, high=2.0, seed=s) for s in (2, 3))
UNIT, SQUARE = numbers(3, 4, low=-0.9, high=0.9), numbers(4, 4, seed=4) + 3 * torch.eye(4).double()
IMAGE, SIGNAL, VOLUME = numbers(2, 2, 6, 5), numbers(2, 2, 7), numbers(1, 2, 4, 4, 3)
LABELS, TOKENS = torch.tensor([0, 3, 1]), torch.tensor([[0, 2], [1, 2]])
MASK = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
SIGNS = torch.tensor([1, -1, 1])
QUERY, KEY = numbers(2, 2, 3, 4), numbers(2, 2, 3, 4, seed=5)

# name: (function, tensors it depends on)
SMOOTH: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    **{
        name: (getattr(torch, name), (A,))
        for name in (
            "exp",
            "exp2",
            "expm1",
            "sin",
            "cos",
            "sinh",
            "cosh",
            "tanh",
            "atan",
            "asinh",
            "sigmoid",
            "erf",
            "erfc",
            "sinc",
            "square",
            "tan",
        )
    },
    **{
        name: (getattr(torch, name), (POSITIVE,))
        for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal")
    },
    **{name: (getattr(torch, name), (POSITIVE,)) for name in ("lgamma", "digamma")},
    **{name: (getattr(torch, name), (UNIT,)) for name in ("asin", "acos", "atanh")},
    "acosh": (lambda x: torch.acosh(1.1 + x), (POSITIVE,)),
    "logit": (lambda x: torch.logit(0.5 + 0.4 * x) + torch.special.logit(0.5 + 0.6 * x, eps=0.1), (UNIT,)),
    "pow": (lambda x: x**3 + x**2 + x**1 + x**0, (A,)),
    "pow-zero": (lambda x: x.square() * (x - x.detach()) ** 0, (A,)),
    "pow-fraction": (lambda x: x**1.7 + x**-0.5, (POSITIVE,)),
    "pow-two": (lambda x, y: x**y + 2.0**y, (POSITIVE, A)),
    "float_power": (lambda x: torch.float_power(x, 3), (A,)),
    "add": (lambda x, y: x + 2 * y + torch.add(x, y, alpha=3) + (1 + y), (A, B)),
    "sub": (lambda x, y: (x - y) - (1 - x) - torch.sub(x, y, alpha=2) + torch.rsub(x, y), (A, B)),
    "mul": (lambda x, y: x * y * 2 + (3 * y) * (x * x.detach()), (A, B)),
    "mul-broadcast": (lambda x, y: x * y[:, :1] + x * y[0] + x / x.detach().exp(), (A, B)),
    "div": (lambda x, y: x / y + 1 / y + y / 3, (A, POSITIVE)),
    "div-mode": (lambda x, y: x * torch.div(x, y, rounding_mode="floor") + torch.remainder(x, 0.7), (A, POSITIVE)),
    "fmod": (lambda x, y: torch.fmod(x, 0.4).square() + torch.fmod(x, y) + (x - y).fmod(2), (A, POSITIVE)),
    "remainder-two": (lambda x, y: torch.remainder(x, y), (A, POSITIVE)),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3) + torch.lerp(x, y, x), (A, B)),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=2) + torch.addcdiv(x, y, 2 + x.square()), (A, B)),
    "xlogy": (lambda x, y: torch.xlogy(x, y) + torch.special.xlogy(y, y), (A, POSITIVE)),
    "atan2": (lambda x, y: torch.atan2(x, y), (A, B)),
    "hypot": (lambda x, y: torch.hypot(x, y), (A, B)),
    "logaddexp": (lambda x, y: torch.logaddexp(x, y), (A, B)),
    "logsumexp": (lambda x: x.logsumexp(1) + torch.logsumexp(x, (0, 1), keepdim=True)[0], (A,)),
    "softmax": (lambda x: F.softmax(x, 1) + x.softmax(0) + torch.softmax(x, -1, dtype=x.dtype) + F.softmin(x, 1), (A,)),
    "log_softmax": (lambda x: F.log_softmax(x, 1) + x.log_softmax(0), (A,)),
    "normalize": (lambda x: F.normalize(x) + F.normalize(x, p=1.0, dim=0), (A,)),
    "cosine_similarity": (lambda x, y: F.cosine_similarity(x, y, dim=1), (A, B)),
}
BRANCHES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    **{
        name: (lambda x, f=f: f(2.5 * x), (A,))
        for name, f in {
            "relu": F.relu,
            "relu6": F.relu6,
            "leaky_relu": F.leaky_relu,
            "elu": lambda x: F.elu(x, 0.7),
            "selu": F.selu,
            "celu": lambda x: F.celu(x, 1.3),
            "gelu": F.gelu,
            "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu,
            "mish": F.mish,
            "softplus": F.softplus,
            "softplus-threshold": lambda x: F.softplus(x, beta=2, threshold=3),
            "logsigmoid": F.logsigmoid,
            "hardtanh": F.hardtanh,
            "hardsigmoid": F.hardsigmoid,
            "hardswish": F.hardswish,
            "hardshrink": F.hardshrink,
            "softshrink": F.softshrink,
            "tanhshrink": F.tanhshrink,
            "softsign": F.softsign,
            "threshold": lambda x: F.threshold(x, 0.1, 2.0),
            "rrelu": lambda x: F.rrelu(x) + F.rrelu(x, training=True),
            "glu": F.glu,
            "abs": lambda x: x.abs() + abs(x),
            "clamp": lambda x: x.clamp(-1, 1) + x.clip(max=0.5) + x.clamp_min(-0.2),
            "sign": lambda x: x * x.sign() + x.floor() + x.round(),
        }.items()
    },
    "prelu": (lambda x, w: F.prelu(x, w[:, 0][:1]) + F.prelu(x.T, w[:, 1]).T, (A, B)),
    "clamp-tensors": (lambda x, y: x.clamp(y - 0.5, y + 0.3) + torch.clamp(x, max=y), (A, B)),
    "equal": (lambda x: torch.where(x == x.max(), x.exp(), x * (x != 0)) * (2 if 7.0 in x else 3), (A,)),
    "normal": (
        lambda x, y: torch.distributions.Normal(x, y, validate_args=True).log_prob(x.detach() + 1),
        (A, POSITIVE),
    ),
    "maximum": (lambda x, y: torch.maximum(x, y) + torch.max(x, y) + torch.fmin(x, y), (A, B)),
    "minimum": (lambda x, y: torch.minimum(x, y) + torch.min(x, 2 * y), (A, B)),
    "max": (lambda x: x.max() + x.max(1).values + x.min(0, keepdim=True)[0].sum() + x.min(), (A,)),
    "amax": (lambda x: x.amax(1) + x.amin() + torch.amax(x, (0, 1)) + torch.aminmax(x, dim=1)[0], (A,)),
    "sort": (lambda x: x.sort(1).values + x.topk(4, 0 + 1)[0] + x.sort(dim=0, descending=True)[0], (A,)),
    "kthvalue": (lambda x: x.kthvalue(2, 1)[0] + x.median(1)[0] + x.median() + x.mode(1)[0], (A,)),
    "cummax": (lambda x: x.cummax(1)[0] + x.cummin(0)[0], (A,)),
    "where": (lambda x, y: torch.where(x > y, x * x, y) + torch.where(MASK, x, 0.0) + x.where(x > 0, y), (A, B)),
    "if": (lambda x: x * 2 if x.sum() > 0 and float(x[0, 0]) < 9 and bool((x > -9).all()) else x, (A,)),
}
SHAPES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "views": (
        lambda x: (
            x.view(4, 3).T.reshape(2, 6).flatten().unflatten(0, (3, 4)).permute(1, 0).transpose(0, 1).contiguous()
        ),
        (A,),
    ),
    "squeeze": (lambda x: x[None].squeeze(0).unsqueeze(-1).expand(3, 4, 2).movedim(0, 1) + x.T.unsqueeze(-1), (A,)),
    "index": (lambda x: x[1:, ::2].sum() + x[MASK].sum() * x[LABELS[:1] % 3, 2] + x[..., None, -1].sum(), (A,)),
    "gather": (
        lambda x: (
            x.gather(1, LABELS[:, None]) * x.index_select(0, torch.tensor([2, 0, 0]))
            + torch.take_along_dim(x, LABELS[:, None], 1)
        ),
        (A,),
    ),
    "cat": (lambda x, y: torch.cat([x, y, torch.ones(1, 4)]) * torch.vstack([y, x, x[:1]]), (A, B)),
    "stack": (lambda x, y: torch.stack([x, y]).mean(0) * torch.hstack([x[:, :2], y[:, :2]]), (A, B)),
    "split": (
        lambda x: sum(p.sum() ** 2 for p in (*x.split(2, 1), *x.chunk(2), *x.unbind(0), *x.tensor_split(2))),
        (A,),
    ),
    "iterate": (lambda x: sum(row.prod() for row in x) * len(x), (A,)),
    "scatter": (
        lambda x, y: (
            torch.zeros(3, 4, dtype=x.dtype).scatter_add(1, MASK.long(), x) + y.scatter(1, MASK.long()[:, :1], 2.0)
        ),
        (A, B),
    ),
    "index_add": (
        lambda x, y: x.index_add(0, torch.tensor([0, 0, 1]), y) + x.index_put((torch.tensor([1]),), y[0]),
        (A, B),
    ),
    "masked": (
        lambda x, y: x.masked_fill(MASK, 3.0) + x.masked_select(MASK).sum() + x.masked_fill(~MASK, y.sum()),
        (A, B),
    ),
    "tril": (lambda x: x.tril() + x.triu(1) + x.diagonal().sum() + torch.diag_embed(x[0]).sum() + x.flip(0), (A,)),
    "repeat": (lambda x: x.repeat(1, 2) * x.repeat_interleave(2, 1) + torch.tile(x, (1, 2)).roll(1, 1), (A,)),
    "pad": (lambda x: F.pad(x, (1, 2), value=3.0) + F.pad(x[None], (1, 2), mode="reflect")[0], (A,)),
    "sums": (lambda x: x.sum(1) + x.mean() + x.cumsum(1)[:, -1] + x.diff(dim=1).sum(1) + x.nansum(), (A,)),
    "moments": (lambda x: x.var(1) + x.std(0).sum() + x.var() + torch.var_mean(x, 1, correction=0)[0] + x.std(), (A,)),
    "prod": (lambda x: x.prod(1) + x.prod() + x.cumprod(1)[:, 1] + x.logcumsumexp(1)[:, -1], (A,)),
    "norms": (lambda x: x.norm() + x.norm(dim=1) + x.norm(p=1) + torch.linalg.norm(x, dim=1) + x.norm(3, 1), (A,)),
    "norm-inf": (lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1) + torch.linalg.matrix_norm(x), (A,)),
    "dist": (lambda x, y: torch.dist(x, y) + F.pairwise_distance(x, y) + torch.cdist(x, y).sum() + F.pdist(x), (A, B)),
    "casts": (lambda x: x.to(torch.float64) * x.clone().type_as(x) + x.to(x), (A,)),
    "like": (
        lambda x: x * torch.ones_like(x) + torch.zeros_like(x) + x.new_ones(3, 4) + torch.ones(12).view_as(x),
        (A,),
    ),
    "no_grad": (lambda x: x * constant(x), (A,)),
    "rfft": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.tensor([1, 1j, 2])) + torch.fft.fft(x).abs(), (A,)),
    "one_hot": (lambda x: x * F.one_hot(x.argmax(1), 4), (A,)),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear").sum() * x.mean(), (IMAGE,)),
    "unfold": (lambda x: F.unfold(x, 2).sum(1) * x.unfold(2, 3, 1).mean(), (IMAGE,)),
    "pixel_shuffle": (lambda x: F.pixel_unshuffle(x[..., :4], 2) ** 2, (IMAGE,)),
    "einsum": (lambda x, y: torch.einsum("ij,kj->ik", x, y) + torch.einsum("ij,ij,kj->ik", x, y, x), (A, B)),
    "matmul": (lambda x, y: x @ y.T + torch.mm(x, y.T) + torch.matmul(x[None], y.T)[0] + x @ x.detach().T, (A, B)),
    "bmm": (
        lambda x, y: torch.bmm(x[0], y[0].mT) + torch.baddbmm(x[1] @ y[1].mT, x[0], y[0].mT, beta=0.5),
        (QUERY, KEY),
    ),
    "mv": (lambda x, y: x.mv(y[0]) + torch.dot(x[0], y[1]) * torch.outer(x[0], y[0]).sum() + x[0].vdot(y[2]), (A, B)),
    "addmm": (lambda x, y: torch.addmm(x[:, :3], x, y.T, beta=2, alpha=0.5) + torch.addmv(x[:, 0], x, y[0]), (A, B)),
    "tensordot": (lambda x, y: torch.tensordot(x, y, dims=([1], [1])) + torch.kron(x[:1, :1], y[:, :3]), (A, B)),
    "multi_dot": (lambda x, y: torch.linalg.multi_dot([x, y.T, x]), (A, B)),
    "linalg": (lambda x: torch.linalg.inv(x) + torch.linalg.det(x) + torch.linalg.solve(x, x.square()), (SQUARE,)),
    "logdet": (lambda x: torch.logdet(x @ x.T) + torch.linalg.slogdet(torch.eye(4))[1], (SQUARE,)),
    "deep": (lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0] * x, (A,)),
}


def constant(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.exp()
        y.mul_(2)
        return y


def in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z += y
    z -= 0.5
    z *= 1.5
    z.mul_(y).div_(2).tanh_()
    z = z + x
    z[0] = y[1]
    z[:, 1] += x[:, 0]
    F.relu(z, inplace=True)
    z = 2 * z
    buffer = torch.zeros(3, 4, dtype=x.dtype)
    buffer[MASK] = z[MASK] * 2
    buffer.index_add_(0, torch.tensor([0, 0, 1]), y)
    row = torch.zeros_like(buffer)[2]
    row += x[0]
    total = torch.zeros((), dtype=x.dtype)
    total += row.square().sum()
    return buffer.clamp_(-1.1, 1.3) + z.masked_fill_(~MASK, 0.3) + total


CONVOLUTIONS = {
    "conv1d": (lambda x, w: F.conv1d(x, w.reshape(2, 2, 3), padding="same"), (SIGNAL, A)),
    "conv2d": (lambda x, w, b: F.conv2d(x, w.reshape(3, 2, 2, 1), b[:, 0], stride=2, padding=1), (IMAGE, A, B)),
    "conv2d-groups": (lambda x, w: F.conv2d(x, w.reshape(4, 1, 3, 1), groups=2, dilation=2), (IMAGE, A)),
    "conv2d-data": (lambda w, b: F.conv2d(IMAGE.to(w), w.reshape(3, 2, 2, 1), b[:, 0]) ** 2, (A, B)),
    "conv2d-bias": (lambda b: F.conv2d(IMAGE.to(b), A.to(b).reshape(3, 2, 2, 1), b[:, 0]), (B,)),
    "conv3d": (lambda x, w: F.conv3d(x, w.reshape(1, 2, 3, 2, 1)), (VOLUME, A)),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w.reshape(2, 2, 3), stride=2), (SIGNAL, A)),
    "conv_transpose2d": (
        lambda x, w: F.conv_transpose2d(x, w.reshape(2, 2, 3, 1), padding=1, output_padding=1, stride=2),
        (IMAGE, A),
    ),
    "conv_transpose3d": (lambda x, w: F.conv_transpose3d(x, w.reshape(2, 1, 3, 2, 1)), (VOLUME, A)),
    "linear": (lambda x, w, b: F.linear(x, w, b[:, 0]) + F.linear(x, w) + F.linear(x.detach(), w), (A, B, POSITIVE)),
    "bilinear": (
        lambda x, w, b: F.bilinear(x, x, w.expand(2, 3, 4)[:, :, None].sum(1).expand(2, 4, 4), b[0, :2]),
        (A, A, B),
    ),
    "embedding": (lambda w: F.embedding(TOKENS, w, padding_idx=0) ** 2, (A,)),
    "embedding_bag": (lambda w, s: F.embedding_bag(TOKENS, w, mode="sum", per_sample_weights=s[:2, :2]), (A, B)),
    "embedding_bag-mean": (lambda w: F.embedding_bag(TOKENS, w, mode="mean"), (A,)),
    "in_place": (in_place, (A, B)),
}


def pool(name: str) -> Function:
    f = getattr(F, name)
    return lambda x: f(x, 2)


LAYERS = {
    **{
        f"{kind}_pool{d}d": (pool(f"{kind}_pool{d}d"), (tensor,))
        for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
        for d, tensor in ((1, SIGNAL), (2, IMAGE), (3, VOLUME))
    },
    "max_pool2d-indices": (lambda x: F.max_pool2d(x, 3, 2, padding=1, return_indices=True)[0], (IMAGE,)),
    "lp_pool2d": (lambda x: F.lp_pool2d(x.abs(), 3, 2), (IMAGE,)),
    "dropout": (lambda x: F.dropout(x, 0.4) * x + torch.dropout(x, 0.3, True), (A,)),
    "dropout2d": (lambda x: F.dropout2d(x, 0.4) * x, (IMAGE,)),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.4, training=True) * x, (A,)),
    "random": (lambda x: x * torch.rand_like(x) + torch.randn(3, 4, dtype=x.dtype) * x.square(), (A,)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (4,), w[0], w[1]) + F.layer_norm(x.detach(), (3, 4), w), (A, B)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w[0]) + F.rms_norm(x, (4,), eps=1e-3), (A, B)),
    "group_norm": (lambda x, w: F.group_norm(x.repeat(1, 2, 1, 1), 2, w[0], w[1]), (IMAGE, A)),
    "batch_norm": (lambda x, w: F.batch_norm(x, None, None, w[0], w[1], training=True), (A, B)),
    "batch_norm-eval": (
        lambda x, w: (
            F.batch_norm(x, ONE[0].to(x), ONE[1].to(x), w[0], w[1]) + F.batch_norm(x, ONE[0].to(x), ONE[2].to(x))
        ),
        (A, B),
    ),
    "instance_norm": (lambda x, w: F.instance_norm(x, weight=w[0, :2], bias=w[1, :2]), (IMAGE, A)),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), (IMAGE,)),
    "attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k * k, is_causal=True), (QUERY, KEY)),
    "attention-mask": (
        lambda q, k: (
            F.scaled_dot_product_attention(q, k, q, attn_mask=numbers(3, 3).to(q), scale=0.3)
            + F.scaled_dot_product_attention(q, k, q, attn_mask=torch.ones(3, 3, dtype=torch.bool).tril())
        ),
        (QUERY, KEY),
    ),
    "attention-dropout": (lambda q, k: F.scaled_dot_product_attention(q, k, k, dropout_p=0.3), (QUERY, KEY)),
    "attention-groups": (
        lambda q, k: F.scaled_dot_product_attention(q, k[:, :1], k[:, :1], enable_gqa=True),
        (QUERY, KEY),
    ),
}
LOSSES = {
    "margin_ranking": (lambda x, y: F.margin_ranking_loss(x[:, 0], y[:, 0], SIGNS, 2.0), (A, B)),
    "hinge_embedding": (lambda x: F.hinge_embedding_loss(x[:, 0], SIGNS), (A,)),
    "cosine_embedding": (lambda x, y: F.cosine_embedding_loss(x, y, SIGNS, 0.1, reduction="none"), (A, B)),
    "triplet_margin": (lambda x, y: F.triplet_margin_loss(x, y, x.flip(0), swap=True), (A, B)),
    "multi_margin": (lambda x: F.multi_margin_loss(x, LABELS) + F.multi_margin_loss(x, LABELS, p=2), (A,)),
    "multilabel_soft_margin": (lambda x: F.multilabel_soft_margin_loss(x, MASK.to(x)), (A,)),
    "l1": (lambda x, y: F.l1_loss(x, y) + F.l1_loss(x, y, reduction="sum"), (A, B)),
    "mse-both": (lambda x, y: F.mse_loss(x, y), (A, B)),
    "huber-both": (lambda x, y: F.huber_loss(x, y, delta=0.5) + F.smooth_l1_loss(x, y, beta=0.0), (A, B)),
    "cross_entropy-soft-target": (lambda x, y: F.cross_entropy(x, y.softmax(1), label_smoothing=0.1), (A, B)),
    "kl_div-both": (lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"), (A, B)),
    "gaussian-variance": (lambda x, v: F.gaussian_nll_loss(x, B.to(x), v), (A, POSITIVE)),
    "bce": (lambda x: F.binary_cross_entropy_with_logits(x, MASK.to(x), pos_weight=ONE[0].to(x)), (A,)),
    "nll": (lambda x: F.nll_loss(x.log_softmax(1), LABELS, weight=ONE[0].to(x), ignore_index=3), (A,)),
}
RULES = {**SMOOTH, **BRANCHES, **SHAPES, **CONVOLUTIONS, **LAYERS, **LOSSES}

# where PyTorch has no second derivative, or one with constants of float32: the formula, to be differentiated instead
FORMULAS: dict[str, Function] = {
    "hardsigmoid": lambda x: (2.5 * x + 3).clamp(0, 6) / 6,
    "hardswish": lambda x: 2.5 * x * (2.5 * x + 3).clamp(0, 6) / 6,
    "celu": lambda x: torch.where(x > 0, 2.5 * x, 1.3 * torch.expm1(2.5 * x / 1.3)),
    "dist": lambda x, y: (
        (x - y).norm()
        + (x - y + 1e-6).norm(dim=1)
        + (x[:, None] - y[None]).norm(dim=-1).sum()
        + (x[[0, 0, 1]] - x[[1, 2, 2]]).norm(dim=1)
    ),
    "embedding_bag": lambda w, s: (w[TOKENS] * s[:2, :2, None]).sum(1),
    "embedding_bag-mean": lambda w: w[TOKENS].mean(1),
    "multi_margin": lambda x: sum(
        ((1 - x[i, y] + x[i, j]).clamp_min(0) + (1 - x[i, y] + x[i, j]).clamp_min(0) ** 2) / 12
        for i, y in enumerate(LABELS)
        for j in range(4)
        if j != y
    ),
}


class Rule:
    """f = Σ cᵢzᵢ + ½Σ zᵢ² of what the function gives: it has curvature even if the function is linear."""

    def __init__(self, function: Function, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        self.function = function
        self.params = [nn.Parameter(t.detach().to(dtype).clone()) for t in tensors]

    def __call__(self) -> Tensor:
        z = self.function(*self.params)
        c = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).view(z.shape)
        return (c * z).sum() + 0.5 * (z * z).mean()


def product_and_slope(name: str, rule: Rule, v: list[Tensor]) -> tuple[Tensor, float]:
    """Hv and gᵀv by two reverse passes, written here."""
    rule = Rule(FORMULAS.get(name, rule.function), tuple(rule.params), rule.params[0].dtype)
    torch.manual_seed(0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(rule(), rule.params, create_graph=True)
    slope = sum((g * x).sum() for g, x in zip(gradient, v, strict=True))
    product = torch.autograd.grad(slope, rule.params, allow_unused=True, materialize_grads=True)
    return flat(product), float(slope.detach())


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def directions(rule: Rule, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in rule.params]


def check(name: str, dtype: torch.dtype, steps: tuple[float, ...], rtol: float) -> None:
    rule = Rule(*RULES[name], dtype)
    v = directions(rule)
    expected, slope = product_and_slope(name, rule, v)
    exact, _ = product_and_slope(name, twin := Rule(*RULES[name], torch.float64), [x.double() for x in v])
    assert exact.norm() > 0
    assert all(p.dtype == torch.float64 for p in twin.params)
    for h in steps:
        torch.manual_seed(0)
        H = tn.ComplexStepHessian(rule, rule.params, h)
        product = flat(H @ v)
        assert (product - expected).norm() <= rtol * max(expected.norm(), exact.norm()), h
        assert abs(H.directional_derivative - slope) <= rtol * max(1.0, abs(slope)), h


@pytest.mark.parametrize("name", RULES)
def test_float64(name):
    check(name, torch.float64, (1e-8, 1e-20, 1e-100), 1e-12)


@pytest.mark.parametrize("name", RULES)
def test_float32(name):
    check(name, torch.float32, (1e-8, 1e-20, 1e-30), 1e-5)


@pytest.mark.parametrize("name", sorted({**SMOOTH, **CONVOLUTIONS, **LAYERS, **LOSSES, **BRANCHES}))
def test_a_large_step_has_an_error_of_second_order(name):
    """Where squares count: from h = 2⁻⁷ to 2⁻¹⁰ the error falls by 64."""
    rule = Rule(*RULES[name], torch.float64)
    v = directions(rule)
    expected, _ = product_and_slope(name, rule, v)
    errors = []
    for h in (2.0**-7, 2.0**-10):
        torch.manual_seed(0)
        errors.append(float((flat(tn.ComplexStepHessian(rule, rule.params, h) @ v) - expected).norm()))
    assert errors[1] <= max(errors[0] / 40, 1e-10 * float(expected.norm()))
