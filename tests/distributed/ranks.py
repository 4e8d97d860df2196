"""Run functions on several local gloo processes, by `launch` or `python ranks.py MODULE SIZE FOLDER [FUNCTION…]`.

One process imports everything and forks one child a rank. Every function of the module whose name begins with `on_`
is run on all ranks in the order of the file; what it returns, or the text of its exception, is saved by rank.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TESTS = Path(__file__).parents[1]


def launch(
    module: str, size: int, factory: pytest.TempPathFactory, timeout: float = 150.0, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The results of every rank by function, of all functions or of those in `only`.

    Of several pytest workers the first one runs it, the others wait for its results.
    """
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"{module}-{size}"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + timeout
        while not (folder / "ended").exists() and time.monotonic() < end:
            time.sleep(0.1)
    else:
        command = [sys.executable, "-W", "error", __file__, module, str(size), str(folder), *only]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        finally:
            (folder / "ended").touch()
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _work(module: str, rank: int, size: int, folder: str, only: Sequence[str]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    found: dict[str, Any] = {}
    for name, function in vars(importlib.import_module(module)).items():
        if name in only or (not only and name.startswith("on_")):
            torch.manual_seed(0)
            try:
                found[name] = function(rank, size)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}.pt")


def main(module: str, size: str, folder: str, *only: str) -> None:
    importlib.import_module(module)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports much, once instead of on every rank
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_work, args=(module, rank, int(size), folder, only)) for rank in range(int(size))
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(max(abs(child.exitcode or 0) for child in children))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main(*sys.argv[1:])
