"""Every benchmark can be imported, but for packages that only benchmarks need."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks

MODULES = sorted(module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks."))


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_imports(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("benchmarks", "torchnewton"):
            raise
        pytest.skip(f"{missing} is not installed")
