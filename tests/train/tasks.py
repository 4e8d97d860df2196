"""Tiny tasks for the tests of training."""

import torch

from torchnewton.train.data import Dataset


def images(size=8, n=40, classes=3):
    x, y = torch.rand(n, 1, size, size), torch.arange(n) % classes
    return Dataset("images", "classification", x, y, x[:9], y[:9], classes)


def values(n=40):
    x = torch.linspace(-1, 1, n)[:, None]
    return Dataset("sine-3", "regression", x, torch.sin(3 * x), x[:9], torch.sin(3 * x[:9]))


def text(n=12):
    ids = torch.arange(n * 16).view(n, 16) % 5
    return Dataset("text", "text", ids, (ids + 1) % 5, ids[:3], (ids[:3] + 1) % 5, 5)
