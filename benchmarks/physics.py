"""Differential equations solved by physics-informed networks, their losses written by hand: `Newton`, L-BFGS and Adam.

    python -m benchmarks.physics

Each run has 15 CPU seconds on one thread, in float64, on fixed points; the relative L2 error of the solution against
the exact one at its end. Adam has the best of three rates, L-BFGS a history of 100 and no tolerances. Written to
benchmarks/results/studies/physics.jsonl and the table of docs/newton.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.study import Row, Rows, write_section
from benchmarks.suite.tables import table
from benchmarks.timing import keep_freed_memory

SECONDS, SEEDS, RATES = 15.0, 3, (1e-3, 3e-3, 1e-2)
INTERIOR, BOUNDARY = 800, 200


@dataclass(frozen=True)
class Problem:
    """A loss of a network, and pairs of points and exact values to compare it with."""

    loss: Callable[[], Tensor]
    points: Tensor
    exact: Tensor

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        return float((model(self.points) - self.exact).norm() / self.exact.norm())


def derivative(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def second(u: Tensor, x: Tensor, k: int) -> Tensor:
    return derivative(derivative(u, x)[:, k], x)[:, k]


def faces(n: int, dimensions: int) -> Tensor:
    """Points on the boundary of the unit cube."""
    x, side = torch.rand(n, dimensions), torch.randint(2 * dimensions, (n,))
    x[torch.arange(n), side // 2] = (side % 2).to(x)
    return x


def pendulum(model: nn.Module) -> Problem:
    """u″ = −sin u, u(0) = 1, u′(0) = 0 up to t = 6."""
    t = torch.linspace(0, 6, 400)[:, None].requires_grad_()

    def loss() -> Tensor:
        u = model(t)
        v = derivative(u, t)
        return ((derivative(v, t) + torch.sin(u)) ** 2).mean() + 10 * (u[0, 0] - 1) ** 2 + 10 * v[0, 0] ** 2

    h, state, exact = 6 / 399 / 50, torch.tensor([1.0, 0.0]), [1.0]

    def slope(y: Tensor) -> Tensor:
        return torch.stack([y[1], -torch.sin(y[0])])

    for step in range(399 * 50):  # Runge-Kutta, to 1e-13
        a = slope(state)
        b = slope(state + h / 2 * a)
        c = slope(state + h / 2 * b)
        state = state + h / 6 * (a + 2 * b + 2 * c + slope(state + h * c))
        if step % 50 == 49:
            exact.append(float(state[0]))
    return Problem(loss, t.detach(), torch.tensor(exact)[:, None])


def heat(model: nn.Module) -> Problem:
    """u_t = ½ u_xx on [0, 1]², from sin πx, 0 at both ends."""
    x, b = torch.rand(INTERIOR, 2).requires_grad_(), faces(BOUNDARY, 2)
    b = b[b[:, 1] < 1]

    def exact(x: Tensor) -> Tensor:
        return torch.exp(-(math.pi**2) / 2 * x[:, 1:]) * torch.sin(math.pi * x[:, :1])

    def loss() -> Tensor:
        u = model(x)
        residual = derivative(u, x)[:, 1] - 0.5 * second(u, x, 0)
        return (residual**2).mean() + ((model(b) - exact(b)) ** 2).mean()

    points = torch.rand(4000, 2)
    return Problem(loss, points, exact(points))


def helmholtz(model: nn.Module) -> Problem:
    """Δu + u = q on [−1, 1]², u = sin πx sin 4πy."""
    x, b = (2 * torch.rand(INTERIOR, 2) - 1).requires_grad_(), 2 * faces(BOUNDARY, 2) - 1

    def exact(x: Tensor) -> Tensor:
        return torch.sin(math.pi * x[:, :1]) * torch.sin(4 * math.pi * x[:, 1:])

    q = (1 - 17 * math.pi**2) * exact(x.detach())[:, 0]

    def loss() -> Tensor:
        u = model(x)
        residual = second(u, x, 0) + second(u, x, 1) + u[:, 0] - q
        return (residual**2).mean() + 100 * (model(b) ** 2).mean()

    points = 2 * torch.rand(4000, 2) - 1
    return Problem(loss, points, exact(points))


def burgers(model: nn.Module) -> Problem:
    """u_t + u u_x = u_xx · 0.02/π from −sin πx; the exact solution by Cole and Hopf."""
    nu = 0.02 / math.pi
    x = torch.rand(INTERIOR, 2)
    x[:, 0] = 2 * x[:, 0] - 1
    x.requires_grad_()
    start, ends = torch.zeros(BOUNDARY, 2), torch.rand(BOUNDARY, 2)
    start[:, 0] = 2 * torch.rand(BOUNDARY) - 1
    ends[:, 0] = ends[:, 0].round() * 2 - 1

    def loss() -> Tensor:
        u = model(x)
        first = derivative(u, x)
        residual = first[:, 1] + u[:, 0] * first[:, 0] - nu * second(u, x, 0)
        initial = model(start) + torch.sin(math.pi * start[:, :1])
        return (residual**2).mean() + (initial**2).mean() + (model(ends) ** 2).mean()

    points = torch.rand(2000, 2)
    points[:, 0] = 2 * points[:, 0] - 1
    y = torch.linspace(-8, 8, 4001)  # ∫ over the heat kernel
    away = points[:, :1] - 2 * torch.sqrt(nu * points[:, 1:]) * y
    weights = torch.softmax(-(y**2) - torch.cos(math.pi * away) / (2 * math.pi * nu), dim=1)
    return Problem(loss, points, -(weights * torch.sin(math.pi * away)).sum(1, keepdim=True))


def poisson(model: nn.Module) -> Problem:
    """Δu = f in five dimensions, u = Σ cos πx."""
    x, b = torch.rand(INTERIOR, 5).requires_grad_(), faces(2 * BOUNDARY, 5)

    def exact(x: Tensor) -> Tensor:
        return torch.cos(math.pi * x).sum(1, keepdim=True)

    f = -(math.pi**2) * exact(x.detach())[:, 0]

    def loss() -> Tensor:
        u = model(x)
        residual = sum((second(u, x, k) for k in range(5)), -f)
        return (residual**2).mean() + 10 * ((model(b) - exact(b)) ** 2).mean()

    points = torch.rand(4000, 5)
    return Problem(loss, points, exact(points))


PROBLEMS: dict[str, tuple[int, Callable[[nn.Module], Problem]]] = {
    "pendulum": (1, pendulum),
    "heat equation": (2, heat),
    "Helmholtz equation": (2, helmholtz),
    "Burgers' equation": (2, burgers),
    "Poisson's equation in 5 dimensions": (5, poisson),
}


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    """As it is used for such losses: a long history, and tolerances that do not end it."""
    options = {"history_size": 100, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    return torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **options)


METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "`Newton(params)`": lambda model: tn.Newton(model.parameters()),
    "L-BFGS, history 100": lbfgs,
    **{f"Adam, {rate:g}": lambda model, rate=rate: torch.optim.Adam(model.parameters(), lr=rate) for rate in RATES},
}


def measure(name: str, method: str, seed: int) -> Row:
    torch.manual_seed(seed)
    inputs, make = PROBLEMS[name]
    hidden = [nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()]
    model = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), *hidden, nn.Linear(32, 1))
    problem, optimizer = make(model), METHODS[method](model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    spent, steps = 0.0, 0
    while spent < SECONDS:
        start = time.process_time()
        optimizer.step(closure)
        spent += time.process_time() - start
        steps += 1
    return {"error": problem.error(model), "loss": float(closure()), "steps": steps, "spent": spent}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.physics", description=__doc__.split("\n")[0])
    parser.add_argument("--problem", action="append", choices=PROBLEMS, help="only measure, this one; again for each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    keep_freed_memory()
    found, lines = Rows("physics"), []
    for name in args.problem or PROBLEMS:
        values = {
            method: [
                found.get(
                    {"problem": name, "method": method, "seed": seed, "seconds": SECONDS},
                    lambda n=name, m=method, s=seed: measure(n, m, s),
                )["error"]
                for seed in range(SEEDS)
            ]
            for method in METHODS
        }
        adam = min((values[m] for m in METHODS if m.startswith("Adam")), key=statistics.median)
        best = [values[m] for m in METHODS if not m.startswith("Adam")] + [adam]
        lines.append([name, *(f"{statistics.median(v):.1e} ({', '.join(f'{x:.1e}' for x in v)})" for v in best)])
    if args.problem:
        return
    heads = ["equation", "`Newton(params)`", "L-BFGS, history of 100", "Adam, best of three rates"]
    text = (
        f"Relative error of the solution after {SECONDS:g} CPU seconds: medians of {SEEDS} seeds, in brackets each. "
        f"{found.machine()}\n\n{table(heads, lines)}\n\nMade by `python -m benchmarks.physics`."
    )
    write_section("newton.md", "physics", text)


if __name__ == "__main__":
    main()
