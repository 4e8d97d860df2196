"""Named sets of settings: whole experiments in one word."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torchnewton.train.errors import choose
from torchnewton.train.runs import Settings

# The published setting of simpleNN: see docs/newton_cg.md.
_SIMPLENN: dict[str, Any] = {
    "method": "newton-cg",
    "model": "cnn4",
    "loss": "squared-error",
    "C": 0.01,
    "subset": 0.05,
    "batch_size": 1024,
    "epochs": 100,
    "center": True,
}
RECIPES: dict[str, dict[str, Any]] = {
    "simplenn-mnist": {**_SIMPLENN, "data": "mnist"},
    "simplenn-mnist-demo": {**_SIMPLENN, "data": "mnist", "samples": 2000, "test_samples": 1000},
    "simplenn-fashion-mnist": {**_SIMPLENN, "data": "fashion-mnist"},
    "simplenn-cifar10": {**_SIMPLENN, "data": "cifar10"},
    "simplenn-cifar10-7layers": {**_SIMPLENN, "data": "cifar10", "model": "cnn7"},
}


def with_recipe(name: str, settings: Settings, given: Collection[str]) -> Settings:
    """`settings` with those of the recipe in the place of all that was not `given`; names are compared in lower case.

    A budget of seconds takes the place of the recipe's epochs, another method that of its subset.

    Raises:
        UsageError: if the name is unknown.
    """
    recipe = RECIPES[choose("recipe", name, list(RECIPES))]
    taken = {key: value for key, value in recipe.items() if key.lower() not in given}
    for option, displaced in (("seconds", "epochs"), ("method", "subset")):
        if option in given:
            taken.pop(displaced, None)
    return replace(settings, **taken)
