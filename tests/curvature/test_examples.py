"""The examples in the docstrings of the operators."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

import torchnewton as tn
from torchnewton import curvature


@pytest.mark.parametrize("name", ["average", "block_diagonal", "fisher", "halves", "hessian"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"torchnewton.curvature.{name}")
    names = {**vars(module), **vars(curvature), **vars(tn), "torch": torch}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
