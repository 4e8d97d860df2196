"""Times a curvature product beside a gradient, a recording, a loss evaluation and exact Jacobian rows.

    python -m benchmarks.products

One thread, CPU time, medians of interleaved measurements; written to benchmarks/results/products.json and,
with the other results, to docs/results.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchnewton as tn
from benchmarks import report
from benchmarks.store import about
from benchmarks.tasks import TASKS
from torchnewton.curvature.dense import dense_from_blocks, sample_blocks
from torchnewton.train.loop import loss_function
from torchnewton.train.models import CharTransformer

ROOT = Path(__file__).parent.parent
ROUNDS = 15
SHORTEST = 0.02  # seconds: shorter work is repeated within one measurement
MAX_ROWS = 1e8  # numbers in the exact rows
MAX_COLUMNS = 2000  # of the dense matrix

Case = tuple[nn.Module, Tensor, Tensor]


def mlp() -> Case:
    layers = [nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)]
    return nn.Sequential(*layers), torch.randn(512, 784), torch.randint(10, (512,))


def cnn() -> Case:
    """CNN_4layers of Wang, Tan, Lin, "Newton Methods for Convolutional Neural Networks"."""
    layers: list[nn.Module] = []
    for channels, filters, size in ((3, 32, 5), (32, 64, 3), (64, 64, 3)):
        layers += [nn.Conv2d(channels, filters, size, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10))
    return model, torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


def transformer() -> Case:
    return CharTransformer(65, 64), torch.randint(65, (32, 64)), torch.randint(65, (32, 64))


def sine() -> Case:
    sizes = [1, 20, 20, 20, 1]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Sigmoid())]
    x = 2 * torch.rand(1000, 1) - 1
    return nn.Sequential(*layers[:-1]), x, torch.sin(10 * x)


CASES: dict[str, Callable[[], Case]] = {
    "MLP 784-1000-1000-10, batch 512": mlp,
    "CNN_4layers at 32×32×3, batch 128": cnn,
    "transformer 2×64, 32 windows of 64": transformer,
    "sine network, batch 1000": sine,
}


def operations(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by the names of the columns."""
    params = list(model.parameters())

    def loss() -> Tensor:
        return loss_function(model(x), y)

    tape = tn.record(loss, params)
    G = tn.GaussNewton(tape)
    v = [torch.randn_like(p) for p in params]
    found: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(loss(), params),
        "evaluation": torch.no_grad()(loss),
        "record": lambda: tn.record(loss, params).gradient,
        "product": lambda: G @ v,
        "naive": lambda: naive_product(model, x, y, v),
    }
    torch.testing.assert_close(found["product"](), found["naive"](), rtol=1e-3, atol=1e-5)
    numbers = sum(z.numel() for z in tape.outputs) * sum(p.numel() for p in params)
    if numbers <= MAX_ROWS:
        found["rows"] = lambda: sample_blocks(tape)
        if sum(p.numel() for p in params) <= MAX_COLUMNS:
            blocks = sample_blocks(tape)
            found["dense"] = lambda: dense_from_blocks(blocks)
    return found


def naive_product(model: nn.Module, x: Tensor, y: Tensor, v: list[Tensor]) -> list[Tensor]:
    """Forward mode, the Hessian of the loss, reverse mode: nothing kept from one product to the next."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (x,))

    with sdpa_kernel(SDPBackend.MATH):
        z, u = jvp(outputs, (params,), (dict(zip(params, v, strict=True)),))
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_function(z, y), z, create_graph=True)
        (product,) = vjp(outputs, params)[1](*torch.autograd.grad(slope, z, u))
    return [product[name] for name in params]


def measure(work: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU seconds of each, measured in turn."""
    repeats = {name: max(1, round(SHORTEST / _seconds(f, 1))) for name, f in work.items() if f() is not None}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, f in work.items():
            times[name].append(_seconds(f, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(f: Callable[[], Any], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        f()
    return (time.process_time() - start) / repeats


def main() -> None:
    torch.set_num_threads(1)
    networks = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        networks[name] = measure(operations(*case()))
        gradient = networks[name]["gradient"]
        print(name, {part: f"{t / gradient:.2f} gradients" for part, t in networks[name].items()}, flush=True)
    path = ROOT / "benchmarks/results/products.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about(), "networks": networks}, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {report.write(list(TASKS.values()), 3, ROOT)}")


if __name__ == "__main__":
    main()
