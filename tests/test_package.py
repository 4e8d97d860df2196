"""The package as a new user meets it: the README's example, the docstrings' examples, the core without its extras."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchnewton as tn
from torchnewton import curvature

README = Path(__file__).parents[1] / "README.md"
SOURCES = Path(tn.__file__).parents[1]
# Results and enumerations; the address of a server is that of its ServerConnection.
NOT_CONSTRUCTED = {"Estimate", "RankError", "RecordError", "ServerConnection", "Spectrum", "Status", "Tape", "Unit"}
WITH_EXAMPLES = sorted(p for p in Path(tn.__file__).parent.rglob("*.py") if ">>> " in p.read_text())


def test_the_example_of_the_readme_trains():
    example = re.search(r"```python\n(import torchnewton as tn\n.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    y = torch.randint(3, (256,))
    x = torch.randn(256, 4) + 4 * F.one_hot(y, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    start = F.cross_entropy(model(x), y).item()
    names = {"model": model, "F": F, "loader": [(x[i::4], y[i::4]) for i in range(4)] * 4}
    exec(example.group(1), names)
    assert F.cross_entropy(model(x), y).item() < 0.6 * start
    assert names["optimizer"].report.accepted


@pytest.mark.parametrize("name", [".".join(p.relative_to(SOURCES).with_suffix("").parts) for p in WITH_EXAMPLES])
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    names = {**vars(curvature), **vars(tn), "torch": torch, **vars(module)}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_core_imports_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import torchnewton; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    extras = {"numpy", "scipy", "sklearn", "matplotlib", "rich", "typer", "jinja2"}
    assert "torchnewton" in found
    assert not any(f"'{extra}'" in found for extra in extras)


def test_every_public_name_is_documented():
    """In its docstring and on a page."""
    pages = "\n".join(p.read_text() for p in [README, *sorted((README.parent / "docs").glob("*.md"))])
    assert [name for name in tn.__all__ if not (getattr(tn, name).__doc__ or "").strip()] == []
    assert [name for name in tn.__all__ if not re.search(rf"\btn\.{name}\b", pages)] == []


def test_every_field_of_the_report_is_described():
    page = (
        (README.parent / "docs" / "newton.md").read_text().partition("## What the report says")[2].partition("\n## ")[0]
    )
    names = [field.name for field in fields(tn.StepReport)]
    assert [name for name in names if f"`{name}`" not in page] == []
    assert [name for name in names if f"`{name}`" not in (tn.StepReport.__doc__ or "")] == []


@pytest.mark.parametrize("name", sorted({*tn.__all__} - NOT_CONSTRUCTED))
def test_every_argument_is_described(name):
    """`params`, `tape` and `closure` mean the same everywhere; a base class may describe the others, too."""
    described = getattr(tn, name)
    bases = [base for base in getattr(described, "__mro__", [described]) if base.__module__.startswith("torchnewton")]
    text = "\n".join(base.__doc__ or "" for base in bases)
    arguments = {*inspect.signature(described).parameters} - {"params", "tape", "closure"}
    assert [argument for argument in sorted(arguments) if not re.search(rf"\b{argument}\b", text)] == []
