"""Networks of every kind under one loss, the cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from zoo.problem import Problem, integers, problem, uniform


class Wrap(nn.Module):
    """Modules and a function of (modules, input): a network in one line."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.parts, x)


class Attention(nn.Module):
    """Causal self-attention with the default kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class GPT(nn.Module):
    """A pre-norm decoder whose head shares its weight with the token embedding."""

    def __init__(self, vocabulary: int = 5, width: int = 4, length: int = 6) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x)).flatten(0, 1)


class MixtureOfExperts(nn.Module):
    """Hard routing: every expert sees the samples whose gate chose it, and another number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 2)
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.gate(x).softmax(1).max(1)
        z = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            chosen = choice == i
            z = z.index_put((chosen,), expert(x[chosen]) * weight[chosen, None])
        return z


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 2, stride=2),
        nn.BatchNorm2d(2, affine=False),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def _calibrated_eval_cnn() -> nn.Module:
    model = _cnn()
    model(uniform(8, 2, 4, 4, seed=7))
    return model.eval()


def _last(parts: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    return head(parts(x)[0][:, -1])


def _every_step(parts: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    return head(parts(x)[0]).transpose(1, 2)  # (N, C, T), not contiguous


def _residual(a: nn.Module, b: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    x = x + torch.tanh(a(x))
    y = x.clone()
    y += b(x).relu()
    return head(y)


def _checkpointed(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    x = checkpoint(lambda y: F.dropout(torch.tanh(first(y)), 0.3), x, use_reentrant=False)
    return checkpoint(second, x, use_reentrant=False)


def _own_weight(layer: nn.Module, x: Tensor) -> Tensor:
    """A functional network on expressions of a parameter."""
    w = layer.weight
    return F.linear(torch.sin(x @ w.T), w * w.abs().sum()) + torch.einsum("ni,ji->nj", x, w).square()


def _in_bfloat16_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def _tied_autoencoder(encode: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(encode(x)), encode.weight.T)


def _compiled() -> nn.Module:
    """Compiled and run once, so that the recording meets compiled code."""
    model = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), backend="eager")
    model(torch.ones(2, 3))
    return model


VECTORS = partial(uniform, 5, 3)
IMAGES = partial(uniform, 4, 2, 4, 4)
SEQUENCES = partial(uniform, 3, 4, 3)
TOKENS = partial(integers, 5, 3, 4)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (_mlp, VECTORS),
    "mlp-dropout": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.GELU(), nn.Linear(4, 3)),
        VECTORS,
    ),
    "one-sample": (_mlp, partial(uniform, 1, 3)),
    "unbatched": (_mlp, partial(uniform, 3)),
    "batchnorm1d": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 3)),
        VECTORS,
    ),
    "norms": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.PReLU(), nn.Linear(4, 3)),
        VECTORS,
    ),
    "cnn-batchnorm-dropout": (_cnn, IMAGES),
    "cnn-eval": (_calibrated_eval_cnn, IMAGES),
    "cnn-channels-last": (_cnn, lambda: IMAGES().to(memory_format=torch.channels_last)),
    "cnn-weights-channels-last": (lambda: _cnn().to(memory_format=torch.channels_last), IMAGES),
    "cnn-groupnorm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.ELU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(4, 3)
        ),
        IMAGES,
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Softplus(), nn.Conv2d(4, 3, 1)),
        IMAGES,
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 2, 2, dilation=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(2, 3)),
        partial(uniform, 4, 3, 3),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3)),
        partial(uniform, 3, 1, 2, 2, 2),
    ),
    "conv-transpose": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.LeakyReLU()),
        partial(uniform, 2, 2, 2, 2),
    ),
    "instancenorm": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.InstanceNorm2d(3, affine=True)),
        partial(uniform, 2, 2, 3, 3),
    ),
    "bilinear": (lambda: Wrap(lambda layer, x: layer(x, x.sin()), nn.Bilinear(3, 3, 3)), VECTORS),
    "lstm": (lambda: Wrap(_last, nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)), SEQUENCES),
    "lstm-deep": (
        lambda: Wrap(_every_step, nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True, dropout=0.2), nn.Linear(4, 3)),
        SEQUENCES,
    ),
    "lstm-cell": (
        lambda: Wrap(lambda cell, x: cell(x[:, 1], cell(x[:, 0]))[0], nn.LSTMCell(3, 3)),
        SEQUENCES,
    ),
    "gru": (lambda: Wrap(_every_step, nn.GRU(3, 2, batch_first=True), nn.Linear(2, 3)), SEQUENCES),
    "rnn": (lambda: Wrap(_last, nn.RNN(3, 2, batch_first=True), nn.Linear(2, 3)), SEQUENCES),
    "transformer-encoder": (
        lambda: Wrap(
            lambda encoder, head, x: head(encoder(x)).flatten(0, 1),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True), 1),
            nn.Linear(4, 3),
        ),
        partial(uniform, 2, 3, 4),
    ),
    "transformer-encoder-norm-first": (
        lambda: Wrap(
            lambda encoder, head, x: head(encoder(x).mean(0)),
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, norm_first=True, activation="gelu"),
                1,
                norm=nn.LayerNorm(4),
                enable_nested_tensor=False,
            ),
            nn.Linear(4, 3),
        ),
        partial(uniform, 3, 2, 4),
    ),
    "multihead-attention": (
        lambda: Wrap(
            lambda a, x: a(x, x, x, need_weights=False)[0].transpose(1, 2),
            nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        partial(uniform, 2, 3, 4),
    ),
    "attention-weights": (
        lambda: Wrap(lambda a, x: a(x, x, x)[1].transpose(1, 2), nn.MultiheadAttention(4, 2, batch_first=True)),
        partial(uniform, 2, 3, 4),
    ),
    "gpt": (GPT, TOKENS),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten(), nn.Linear(8, 3)),
        TOKENS,
    ),
    "tied-weights": (lambda: Wrap(_tied_autoencoder, nn.Linear(3, 2)), VECTORS),
    "module-twice": (lambda: Wrap(lambda layer, x: layer(torch.tanh(layer(x))), nn.Linear(3, 3)), VECTORS),
    "module-twice-other-shape": (
        lambda: Wrap(lambda layer, x: layer(x) + layer(x[:2]).tanh().mean(0), nn.Linear(3, 3)),
        VECTORS,
    ),
    "residual": (lambda: Wrap(_residual, nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)), VECTORS),
    "functional": (lambda: Wrap(_own_weight, nn.Linear(3, 3, bias=False)), VECTORS),
    "mixture-of-experts": (MixtureOfExperts, VECTORS),
    "weight-norm": (lambda: nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)), VECTORS),
    "spectral-norm": (
        lambda: nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)),
        VECTORS,
    ),
    "functional-call": (
        lambda: Wrap(
            lambda model, x: torch.func.functional_call(model, {k: 2 * p for k, p in model.named_parameters()}, x),
            _mlp(),
        ),
        VECTORS,
    ),
    "batch-in-the-middle": (
        lambda: Wrap(lambda layer, x: layer(x) - layer(x).mean(0), nn.Linear(3, 3)),
        VECTORS,
    ),
    "time-first": (lambda: Wrap(lambda gru, x: gru(x)[0].flatten(0, 1), nn.GRU(3, 3)), SEQUENCES),
    "checkpoint": (lambda: Wrap(_checkpointed, nn.Linear(3, 4), nn.Linear(4, 3)), VECTORS),
    "autocast": (lambda: Wrap(_in_bfloat16_autocast, _mlp()), VECTORS),
    "compiled": (_compiled, VECTORS),
}


def build_network(make: Callable[[], nn.Module], data: Callable[[], Tensor], dtype: torch.dtype) -> Problem:
    """Cross entropy of a network that gives (C,), (N, C) or (N, C, …) logits."""
    torch.manual_seed(1)
    model = make().to(dtype)
    x = data()
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        shape = model(x).shape
    classes = shape[0] if len(shape) == 1 else shape[1]
    y = integers(classes, *shape[:1], *shape[2:]) if len(shape) > 1 else torch.tensor(1)
    return problem(model, lambda: [model(x)], lambda z: F.cross_entropy(z, y))
