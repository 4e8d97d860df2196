"""What is done to a task before it is trained on: fewer samples, a validation set, the mean image taken away."""

from __future__ import annotations

from dataclasses import replace

import torch

from torchnewton.train.data import SPLIT_SEED, Dataset
from torchnewton.train.errors import UsageError, choose

LOSSES = ["auto", "cross-entropy", "squared-error"]


def prepared(
    data: Dataset,
    samples: int | None = None,
    test_samples: int | None = None,
    validation: float | None = None,
    center: bool = False,
    loss: str = "auto",
) -> Dataset:
    """The first `samples` and `test_samples`; a `validation` part of the training set held out; centred inputs.

    `center` subtracts the mean of the training inputs, for images that of each pixel. `loss` is one of `LOSSES`.

    Raises:
        UsageError: if the task has no such loss, or not so many samples.
    """
    if choose("loss", loss, LOSSES) != "auto" and data.kind == "regression":
        raise UsageError(f"--loss {loss} is for classes: {data.name} has values to predict.")
    if center and data.kind == "text":
        raise UsageError(f"--center is for numbers: {data.name} is text.")
    data = replace(
        data,
        loss=loss,
        x_train=data.x_train[:samples],
        y_train=data.y_train[:samples],
        x_test=data.x_test[:test_samples],
        y_test=data.y_test[:test_samples],
    )
    if validation is not None:
        data = _held_out(data, validation)
    if center:
        mean = data.x_train.mean(0)
        held = None if data.x_validation is None else data.x_validation - mean
        data = replace(data, x_train=data.x_train - mean, x_test=data.x_test - mean, x_validation=held)
    return data


def _held_out(data: Dataset, fraction: float) -> Dataset:
    count = round(fraction * len(data.x_train))
    if not 0 < count < len(data.x_train):
        raise UsageError(f"--validation {fraction:g} leaves {count} of {len(data.x_train)} samples for validation.")
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, kept = (index.to(data.x_train.device).sort().values for index in (order[:count], order[count:]))
    return replace(
        data,
        x_train=data.x_train[kept],
        y_train=data.y_train[kept],
        x_validation=data.x_train[held],
        y_validation=data.y_train[held],
    )
