"""The data sets of "Distributed Newton Methods for Deep Neural Networks": tables with classes, sigmoid networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.suite.methods import usual
from benchmarks.suite.networks import sigmoid, squared_error
from benchmarks.suite.problems import Supervised
from benchmarks.suite.task import Task
from benchmarks.suite.tasks import data as sets
from torchnewton.train.data import Dataset


def _task(
    name: str, what: str, samples: int, target: float, read: Callable[[Path], Dataset], sensitivity: float = 0.0
) -> Task:
    return Task(
        name,
        f"{what}; columns with mean 0 and deviation 1, two hidden layers of 100 sigmoids, ‖z − y‖² for y one-hot.",
        "test accuracy",
        targets=(target,),
        published="none for this network",
        seconds=4,
        search_seconds=1.5,
        search_limit=4,
        limit=12,
        samples=samples,
        sensitivity=sensitivity,
        problem=lambda folder: Supervised(read(folder), sigmoid(100, 100), squared_error),
        entries=usual("classification", samples),
    )


CLASSES = (
    _task(
        "letter",
        "Letters from 16 features, 15,000 training and 5,000 test samples",
        15_000,
        0.93,
        lambda folder: sets.file("libsvm", folder / "libsvm/letter.scale"),
        sensitivity=6,
    ),
    _task(
        "pendigits",
        "Digits from 16 points of a pen, 7,494 training and 3,498 test samples of other writers",
        7494,
        0.975,
        lambda folder: sets.file("libsvm", folder / "libsvm/pendigits"),
    ),
    _task(
        "satimage",
        "Soil from 36 values of a satellite image, 4,435 training and 2,000 test samples",
        4435,
        0.91,
        lambda folder: sets.satimage(folder / "uci-classification"),
    ),
)
