"""Models by name; their shapes come from the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchnewton.train import simplenn
from torchnewton.train.data import Dataset
from torchnewton.train.errors import UsageError, choose

NAMES = ["auto", "cnn", "lenet", *simplenn.NAMES, "mlp", "sigmoid-mlp", "linear", "transformer"]


def build(spec: str, data: Dataset) -> nn.Module:
    """Builds the model `spec` for `data`; `mlp:256-256` and `sigmoid-mlp:20-20-20` give the hidden sizes.

    Raises:
        UsageError: if the name is unknown or the model does not fit the data.
    """
    spec = resolve(spec, data)
    name = spec.partition(":")[0]
    if (name == "transformer") != (data.kind == "text"):
        raise UsageError(f"--model {name} does not fit {data.name}: transformer is the model for text.")
    if name in _SMALLEST_IMAGE:
        if not data.is_image:
            raise UsageError(f"--model {name} needs images, and {data.name} has none: choose mlp or linear.")
        least = _SMALLEST_IMAGE[name]
        if min(data.x_train.shape[-2:]) < least:
            raise UsageError(
                f"--model {name} needs images of {least}×{least} pixels or more: choose cnn for {data.name}."
            )
    if name in simplenn.NAMES:
        return simplenn.network(name, data.x_train.shape[1:], outputs(data))
    if name in ("mlp", "sigmoid-mlp", "linear"):
        return _mlp(data, _hidden(spec), sigmoid=name == "sigmoid-mlp")
    return _BUILDERS[name](data)


def resolve(spec: str, data: Dataset) -> str:
    """The model's full name: `auto` chooses by the task, and missing sizes are filled in."""
    if spec == "auto":
        if data.name.startswith("sine-"):
            spec = "sigmoid-mlp"
        else:
            spec = "transformer" if data.kind == "text" else "cnn" if data.is_image else "mlp"
    name, _, sizes = spec.partition(":")
    if sizes and name not in _SIZES:
        raise UsageError(f"--model {name} takes no sizes: only mlp and sigmoid-mlp do.")
    return f"{name}:{sizes or _SIZES[name]}" if name in _SIZES else choose("model", name, NAMES)


def is_convolutional(spec: str, data: Dataset) -> bool:
    """Whether the model is one of the convolutional ones."""
    return resolve(spec, data).partition(":")[0] in _SMALLEST_IMAGE


def outputs(data: Dataset) -> int:
    """The number of outputs of a model for `data`."""
    return data.num_classes or data.y_train.shape[-1]


_SMALLEST_IMAGE = {"cnn": 2, "lenet": 16, **{name: simplenn.smallest_image(name) for name in simplenn.NAMES}}
_SIZES = {"mlp": "64-64", "sigmoid-mlp": "20-20-20"}


def are_sizes(text: str) -> bool:
    """Whether it is a list of sizes as in 256-256, each at most 10⁹."""
    return all(size.isdecimal() and 0 < int(size) <= 10**9 for size in text.split("-"))


def _hidden(spec: str) -> list[int]:
    sizes = spec.partition(":")[2]
    if not sizes:
        return []
    if not are_sizes(sizes):
        raise UsageError(f"--model {spec} is not understood: write the hidden sizes as mlp:256-256.")
    return [int(size) for size in sizes.split("-")]


def _mlp(data: Dataset, hidden: list[int], sigmoid: bool) -> nn.Module:
    """Layers of the `hidden` sizes with ReLU; or with sigmoids, weights from N(0, 1) and biases 0."""
    sizes = [math.prod(data.x_train.shape[1:]), *hidden, outputs(data)]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layer = nn.Linear(fan_in, fan_out)
        if sigmoid:
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        layers += [layer, nn.Sigmoid() if sigmoid else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _cnn(data: Dataset) -> nn.Module:
    """Two 3×3 convolutions with GELU, pooling after each (below 16 pixels after the last), a linear layer.

    9,930 parameters on digits.
    """
    channels, height, width = data.x_train.shape[1:]
    pools = 1 if min(height, width) < 16 else 2
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2) if pools == 2 else nn.Identity(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height >> pools) * (width >> pools), outputs(data)),
    )


def _lenet(data: Dataset) -> nn.Module:
    channels, height, width = data.x_train.shape[1:]
    features = 16 * ((height - 4) // 2 - 4 >> 1) * ((width - 4) // 2 - 4 >> 1)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(features, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, outputs(data)),
    )


class CharTransformer(nn.Module):
    """A causal transformer over characters: `(N, window)` numbers to `(N, window, vocabulary)` logits."""

    def __init__(self, vocabulary: int, window: int, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(window, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the logits of each next character."""
        x = self.characters(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    """Pre-norm attention and a two-layer MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attention.transpose(1, 2).flatten(2))
        return x + torch.as_tensor(self.mlp(self.norm2(x)))


_BUILDERS: dict[str, Callable[[Dataset], nn.Module]] = {
    "cnn": _cnn,
    "lenet": _lenet,
    "transformer": lambda data: CharTransformer(data.num_classes, data.x_train.shape[1]),
}
