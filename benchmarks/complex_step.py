"""Error of a Hessian product against the step h, and what a product costs.

    python -m benchmarks.complex_step

Writes docs/figures/complex_step_error.svg and benchmarks/results/complex_step.json, prints the ratios. The error is
measured against a product in extended precision, written by hand. Times: one thread, CPU time, medians of interleaved
measurements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchnewton as tn
from benchmarks.cases import CASES
from benchmarks.suite.store import about
from benchmarks.timing import measure
from torchnewton.train.figures import STYLE
from torchnewton.train.loop import loss_function

ROOT = Path(__file__).parent.parent
STEPS = [10.0**-k for k in range(1, 101)]
SIZES = (5, 20, 3)  # of the network tanh(xW₁ᵀ + b₁)W₂ᵀ + b₂
Array = NDArray[Any]
LINES = {
    "complex step": ("#1f5fd0", "-"),
    "central differences": ("#d9480f", "-"),
    "autograd, two reverse passes": ("#2b8a3e", "--"),
}


def task(dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
    """A closure, its parameters, a direction and the data; the same numbers in every precision."""
    torch.manual_seed(0)
    a, b, c = SIZES
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c))
    x, y = torch.randn(64, a), torch.randn(64, c)
    params = [p.detach().to(dtype).requires_grad_() for p in model.parameters()]
    v = [torch.randn(p.shape).to(dtype) for p in params]
    x, y = x.to(dtype), y.to(dtype)

    def closure() -> Tensor:
        w1, b1, w2, b2 = params
        return nn.functional.mse_loss(torch.tanh(x @ w1.T + b1) @ w2.T + b2, y)

    return closure, params, v, (x, y)


def exact(params: Sequence[Tensor], v: Sequence[Tensor], data: tuple[Tensor, Tensor]) -> Array:
    """Hv by Pearlmutter's formulas in NumPy's extended precision."""
    w1, b1, w2, b2, r1, s1, r2, s2, x, y = (
        t.detach().double().numpy().astype(np.longdouble) for t in (*params, *v, *data)
    )
    h = np.tanh(x @ w1.T + b1)
    slope = 1 - h * h
    rh = slope * (x @ r1.T + s1)
    e = 2 * (h @ w2.T + b2 - y) / y.size
    re = 2 * (rh @ w2.T + h @ r2.T + s2) / y.size
    back = e @ w2
    ra = slope * (re @ w2 + e @ r2) - 2 * h * rh * back
    return np.concatenate([(ra.T @ x).ravel(), ra.sum(0), (re.T @ h + e.T @ rh).ravel(), re.sum(0)])


def errors(dtype: torch.dtype) -> dict[str, list[tuple[float, float]]]:
    """(h, relative error) of every way; a way without a step has one number."""
    closure, params, v, data = task(dtype)
    reference = exact(params, v, data)

    def error(product: Sequence[Tensor]) -> float:
        found = np.concatenate([t.detach().double().numpy().ravel() for t in product]).astype(np.longdouble)
        return max(float(np.linalg.norm(found - reference) / np.linalg.norm(reference)), 1e-17)

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
    for h in STEPS:
        if h > 1e-31 or dtype == torch.float64:
            found["complex step"].append((h, error(tn.ComplexStepHessian(closure, params, h) @ v)))
        difference = error(tn.FiniteDifference(h).product(closure, params, v))
        if difference > 0 and math.isfinite(difference):
            found["central differences"].append((h, difference))
    found["autograd, two reverse passes"].append((math.nan, error(tn.Autodiff().product(closure, params, v))))
    return found


def draw(results: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """One panel a precision."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, (name, lines) in zip(figure.subplots(1, 2, sharey=True), results.items(), strict=True):
            axes.set(xscale="log", yscale="log", xlabel="step h", xlim=(1, 1e-101), ylim=(1e-17, 10))
            axes.set_title(name, pad=10)
            for label, points in lines.items():
                colour, style = LINES[label]
                if len(points) == 1:
                    axes.axhline(points[0][1], color=colour, linestyle=style, linewidth=1.8, label=label)
                else:
                    axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=2.2, label=label)
            axes.set_xticks([10.0**-k for k in range(0, 101, 20)])
        figure.axes[0].set_ylabel("relative error of Hv")
        figure.axes[1].legend(frameon=False, loc="center right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def costs(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """CPU seconds of a gradient and of a product by each way."""
    params = list(model.parameters())

    def loss() -> Tensor:
        return loss_function(model(x), y)

    tape = tn.record(loss, params, create_graph=False)
    double, step = tn.Hessian(tape), tn.ComplexStepHessian.of(tape)
    v = [torch.randn_like(p) for p in params]

    def two_passes() -> Sequence[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            gradient = torch.autograd.grad(loss(), params, create_graph=True)
        return torch.autograd.grad(gradient, params, v)

    return measure(
        {
            "gradient": lambda: torch.autograd.grad(loss(), params),
            "complex step": lambda: step @ v,
            "double backward, graph kept": lambda: double @ v,
            "double backward, from the closure": two_passes,
        }
    )


def trap(h: float = 1e-20) -> dict[str, float]:
    """Relative error of the imaginary part in PyTorch's own complex operations, against the product rule."""
    torch.manual_seed(0)

    def error(f: Callable[..., Tensor], *shapes: tuple[int, ...]) -> float:
        (a, b), (x, y) = (tuple(torch.randn(s, dtype=torch.float64) for s in shapes) for _ in range(2))
        found = f(torch.complex(a, h * x), torch.complex(b, h * y)).imag / h
        expected = f(a, y) + f(x, b)
        return float((found - expected).norm() / expected.norm())

    return {
        "convolution": error(nn.functional.conv2d, (4, 3, 8, 8), (5, 3, 3, 3)),
        "matrix product": error(torch.matmul, (50, 50), (50, 50)),
    }


def main() -> None:
    torch.set_num_threads(1)
    lost = trap()
    print("PyTorch's complex operations at h = 1e-20, relative error:", {k: f"{e:.1e}" for k, e in lost.items()})
    curves = {str(d).removeprefix("torch."): errors(d) for d in (torch.float64, torch.float32)}
    draw(curves, ROOT / "docs/figures/complex_step_error.svg")
    for name, lines in curves.items():
        for label, points in lines.items():
            h, least = min(points, key=lambda point: point[1])
            print(f"{name}: {label}: least error {least:.1e}" + ("" if math.isnan(h) else f" at h = {h:.0e}"))
    times = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        times[name] = costs(*case())
        gradient = times[name]["gradient"]
        print(name, {part: f"{t / gradient:.2f} gradients" for part, t in times[name].items()}, flush=True)
    points = {
        name: {label: [[None if math.isnan(h) else h, e] for h, e in line] for label, line in lines.items()}
        for name, lines in curves.items()
    }
    path = ROOT / "benchmarks/results/complex_step.json"
    path.write_text(
        json.dumps({"about": about(), "errors": points, "trap": lost, "seconds": times}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
