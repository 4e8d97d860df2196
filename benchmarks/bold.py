"""What bold steps are worth: functions learned from mini-batches, with and without noise, by `Newton` and by Adam.

    python -m benchmarks.bold

Five CPU seconds a run on one thread, 7,000 samples in batches of 300, networks with tanh; the mean squared distance to
the function itself on 3,000 other points, the median of the last quarter of the run. Adam has the best of three rates.
Written to benchmarks/results/studies/bold.jsonl and the table of docs/newton.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.study import Row, Rows, write_section
from benchmarks.suite.tables import table
from benchmarks.timing import keep_freed_memory

SECONDS, BATCH, SEEDS, RATES = 5.0, 300, 3, (1e-3, 3e-3, 1e-2)
NOISES = (0.0, 0.1)
Function = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "sinc(10x), 1-20-1": (lambda x: torch.sinc(10 * x), (1, 20, 1)),
    "sin(10x), 1-20-20-1": (lambda x: torch.sin(10 * x), (1, 20, 20, 1)),
    "sin(4x)·cos(6y), 2-32-32-1": (lambda x: torch.sin(4 * x[:, :1]) * torch.cos(6 * x[:, 1:]), (2, 32, 32, 1)),
}


def network(sizes: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(*[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())][:-1])


def newton(model: nn.Module, bold: bool) -> tn.Newton:
    optimizer = tn.Newton(model.parameters())
    if not bold and optimizer.choice is not None:
        optimizer.choice = replace(optimizer.choice, bold=None)
    return optimizer


METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "`Newton(params)`": lambda model: newton(model, bold=True),
    "without bold steps": lambda model: newton(model, bold=False),
    **{f"Adam, {rate:g}": lambda model, rate=rate: torch.optim.Adam(model.parameters(), lr=rate) for rate in RATES},
}


def measure(function: str, noise: float, method: str, seed: int) -> Row:
    f, sizes = FUNCTIONS[function]
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(10_000, sizes[0], generator=generator) - 1
    exact = f(x)
    y = exact + noise * torch.randn(exact.shape, generator=generator)
    torch.manual_seed(seed)
    model = network(sizes)
    optimizer = METHODS[method](model)
    spent, values, steps = 0.0, [], 0
    while spent < SECONDS:
        i = torch.randint(7000, (BATCH,), generator=generator)

        def closure(i: Tensor = i) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x[i]), y[i])
            loss.backward()
            return loss

        start = time.process_time()
        optimizer.step(closure)
        spent += time.process_time() - start
        steps += 1
        if steps % 20 == 0:
            with torch.no_grad():
                values.append(float(F.mse_loss(model(x[7000:]), exact[7000:])))
    return {"distance": statistics.median(values[-(len(values) // 4) :]), "steps": steps}


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    found = Rows("bold")
    rows = []
    for function in FUNCTIONS:
        for noise in NOISES:
            values = {
                method: [
                    found.get(
                        {"function": function, "noise": noise, "method": method, "seed": seed, "seconds": SECONDS},
                        lambda f=function, n=noise, m=method, s=seed: measure(f, n, m, s),
                    )["distance"]
                    for seed in range(SEEDS)
                ]
                for method in METHODS
            }
            adam = min((values[m] for m in METHODS if m.startswith("Adam")), key=statistics.median)
            newtons = [values[m] for m in METHODS if not m.startswith("Adam")]
            texts = [f"{statistics.median(v):.1e} ({', '.join(f'{x:.1e}' for x in v)})" for v in (*newtons, adam)]
            rows.append([function, f"{noise:g}", *texts])
    heads = ["function, network", "noise", "`Newton(params)`", "without bold steps", "Adam, best of three rates"]
    text = (
        f"Mean squared distance to the function after {SECONDS:g} CPU seconds, batches of {BATCH}: medians of {SEEDS} "
        f"seeds, in brackets each. {found.machine()}\n\n{table(heads, rows)}\n\nMade by `python -m benchmarks.bold`."
    )
    write_section("newton.md", "bold", text)


if __name__ == "__main__":
    main()
