"""The convolutional networks of simpleNN."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

# A number is a convolution with as many filters of 3×3 pixels (the first of cnn4 and cnn7: 5×5) and a ReLU; M is a
# max-pooling of 2×2; after `/` come the hidden dense layers with a ReLU.
_LAYERS = {
    "cnn4": "32 M 64 M 64 M",
    "cnn7": "32 32 M 64 64 M 64 128 M",
    "vgg11": "64 M 128 M 256 256 M 512 512 M 512 512 M / 4096 4096",
    "vgg13": "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M / 4096 4096",
    "vgg16": "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M / 4096 4096",
    "vgg19": "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M / 4096 4096",
}
NAMES = list(_LAYERS)


def smallest_image(name: str) -> int:
    """The least height and width whose poolings of network `name` leave a pixel."""
    return 1 << _LAYERS[name].count("M")


def network(name: str, image: Sequence[int], classes: int) -> nn.Sequential:
    """Network `name` for images of shape C×H×W: CNN_4layers is `cnn4`, CNN_7layers is `cnn7`, `vgg11` to `vgg19`.

    Convolutions keep the size of the image; weights come from N(0, 2/fan_in), biases are 0.

    Source: Wang, Tan, Lin, "Newton Methods for Convolutional Neural Networks", arXiv 1811.06100, and its code simpleNN.

    >>> sum(p.numel() for p in network("cnn4", (3, 32, 32), 10).parameters())
    68106
    """
    channels, height, width = image
    convolutions, _, dense = _LAYERS[name].partition("/")
    layers: list[nn.Module] = []
    for part in convolutions.split():
        if part == "M":
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        else:
            size = 5 if name.startswith("cnn") and not layers else 3
            layers += [nn.Conv2d(channels, int(part), size, padding=size // 2), nn.ReLU()]
            channels = int(part)
    layers.append(nn.Flatten())
    features = channels * height * width
    for part in dense.split():
        layers += [nn.Linear(features, int(part)), nn.ReLU()]
        features = int(part)
    layers.append(nn.Linear(features, classes))
    model = nn.Sequential(*layers)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.kaiming_normal_(p, nonlinearity="relu")
        else:
            nn.init.zeros_(p)
    return model
