"""Data sets of the tasks: those of `torchnewton train`, cut and scaled as the tasks say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from torchnewton.train import data
from torchnewton.train.data import Dataset
from torchnewton.train.errors import UsageError


def file(form: str, path: Path) -> Dataset:
    """A file of the data folder; `form` is that of `--data form:FILE`."""
    if not path.is_file():
        raise UsageError(f"There is no file {path}: give the folder that holds the data sets as --data-dir.")
    return data.load(f"{form}:{path}", path.parent)


def first(found: Dataset, train: int | None, test: int) -> Dataset:
    """The first samples of both sets."""
    cut = slice(train)
    return replace(
        found,
        x_train=found.x_train[cut],
        y_train=found.y_train[cut],
        x_test=found.x_test[:test],
        y_test=found.y_test[:test],
    )


def held_out(found: Dataset, train: int, test: int) -> Dataset:
    """The first training samples, tested on those that follow."""
    x, y = found.x_train, found.y_train
    rest = slice(train, train + test)
    return replace(found, x_train=x[:train], y_train=y[:train], x_test=x[rest], y_test=y[rest])


def centred(found: Dataset) -> Dataset:
    """Without each pixel's mean over the training images."""
    mean = found.x_train.mean(0)
    return replace(found, x_train=found.x_train - mean, x_test=found.x_test - mean)


def standardized_images(found: Dataset) -> Dataset:
    """Every image with mean 0 and deviation 1."""
    x_train, x_test = (
        (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True) for x in (found.x_train, found.x_test)
    )
    return replace(found, x_train=x_train, x_test=x_test)


def pictures(found: Dataset) -> Dataset:
    """Images that are their own targets, as rows of pixels."""
    x_train, x_test = found.x_train.flatten(1), found.x_test.flatten(1)
    return Dataset(found.name, "regression", x_train, x_train, x_test, x_test)


def satimage(folder: Path) -> Dataset:
    """Statlog's Landsat images: 36 values, scaled to deviation 1, and classes 1 to 5 and 7."""
    files = [folder / name for name in ("sat.trn", "sat.tst")]
    if missing := [path for path in files if not path.is_file()]:
        raise UsageError(f"There is no file {missing[0]}: give the folder that holds the data sets as --data-dir.")
    train, test = (np.loadtxt(path) for path in files)
    mean, deviation = train[:, :36].mean(0), train[:, :36].std(0)
    x = [torch.tensor((part[:, :36] - mean) / deviation, dtype=torch.float32) for part in (train, test)]
    y = [torch.from_numpy(np.searchsorted([1, 2, 3, 4, 5, 7], part[:, 36])) for part in (train, test)]
    return Dataset("satimage", "classification", x[0], y[0], x[1], y[1], 6)


def sinc() -> Dataset:
    """y = sinc(10x), sinc(x) = sin(πx)/(πx), at 20,000 points of [−1, 1]; there is no other test set."""
    x = torch.linspace(-1, 1, 20_000).unsqueeze(1)
    y = torch.sinc(10 * x)
    return Dataset("sinc", "regression", x, y, x, y)
