"""A Newton-CG step on streamed data: peak memory by size of data and subset, gradients a product, and where time goes.

    python -m benchmarks.streaming

prints the tables of docs/newton_cg.md, on CNN_4layers with random images of 32×32×3; every peak is that of a process of
its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.cases import cnn_4layers
from benchmarks.memory import _status
from benchmarks.timing import measure

BATCH = 32
CASES = ((3200, 0.01), (3200, 0.05), (3200, 0.1), (6400, 0.01), (6400, 0.05), (6400, 0.1))
ITERATIONS = 3  # too few for layer factors
# so that freed memory goes back, and the peak is what is in use
FAITHFUL = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def squared_error(model: nn.Module, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
    return F.mse_loss(model(x[i]), F.one_hot(y[i], 10).float(), reduction="sum") / len(i)


def task(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return cnn_4layers(), torch.randn(count, 3, 32, 32), torch.randint(10, (count,))


def peak(count: int, fraction: float, iterations: int = ITERATIONS) -> int:
    """Bytes by which a step grows the process at its peak, and with `fraction` 0 those of a gradient of one batch."""
    model, x, y = task(count)
    loss = partial(squared_error, model, x, y)

    def step(samples: int) -> None:
        if not fraction:
            torch.autograd.grad(loss(torch.arange(min(samples, BATCH))), list(model.parameters()))
            return
        optimizer = tn.NewtonCG(model.parameters(), rtol=1e-9, max_iterations=iterations)
        subset = next(tn.Subsets(samples, fraction))
        optimizer.step(tn.over(torch.arange(samples).split(BATCH), loss), curvature=tn.over(subset.split(BATCH), loss))
        assert optimizer.report.products > 1

    if fraction:
        tn.NewtonCG(model.parameters(), max_iterations=1).step(partial(loss, torch.arange(2)))  # libraries loaded
    else:
        loss(torch.arange(2)).backward()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _status("VmRSS")
    step(count)
    return _status("VmHWM") - before


def peaks() -> None:
    print("| training samples | subset | batches of the subset | peak, MB |\n| ---: | ---: | ---: | ---: |")
    for count, fraction in CASES:
        batches = len(next(tn.Subsets(count, fraction)).split(BATCH))
        print(f"| {count} | {fraction:.0%} | {batches} | {_in_child(count, fraction) / 1e6:.0f} |")
    print(f"| 3200, layer factors | 1% | 1 | {_in_child(3200, 0.01, 100) / 1e6:.0f} |")
    print(f"| one gradient of {BATCH} | | | {_in_child(BATCH, 0) / 1e6:.0f} |\n")


def _in_child(count: int, fraction: float, iterations: int = ITERATIONS) -> int:
    arguments = [str(count), str(fraction), str(iterations)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.streaming", *arguments]
    root, env = Path(__file__).parent.parent, {**os.environ, **FAITHFUL}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=env)
    return int(done.stdout)


def products() -> None:
    """Times in gradients of the same samples."""
    model, x, y = task(2 * BATCH)
    loss, params = partial(squared_error, model, x, y), list(model.parameters())
    two, one = torch.arange(2 * BATCH).split(BATCH), torch.arange(BATCH)
    A, tape = tn.Average(tn.over(two, loss), params), tn.record(partial(loss, one), params)
    kept, v = tn.GaussNewton(tape, tn.Jacobian(tape)), tape.gradient
    explicit = tn.GaussNewton(tape, tn.LayerJacobian(tape))
    found = measure(
        {
            "gradient": lambda: torch.autograd.grad(loss(one), params),
            "streamed": lambda: A @ v,
            "kept": lambda: kept @ v,
            "explicit": lambda: explicit @ v,
        }
    )
    unit = found["gradient"]
    print("| product | gradients |\n| --- | ---: |")
    for name, batches in (("streamed", 2), ("kept", 1), ("explicit", 1)):
        print(f"| {name} | {found[name] / unit / batches:.2f} |")


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(peak(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
    else:
        peaks()
        products()


if __name__ == "__main__":
    main()
