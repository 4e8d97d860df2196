"""Counts the iterations of CG without and with each preconditioner, on two networks trained on MNIST by 100 Adam steps.

    python -m benchmarks.preconditioners --data-dir FOLDER

One thread; batch 512, float32, λ = 1e-3. Three counts: until the quadratic model has fallen by 90 % and by 99 % of what
it can, which is what a step gains, and until the residual is 1e-3 of the gradient in the Euclidean norm, which weighs
directions of large curvature that a good preconditioner takes down. Beside them the part of the fall that the
preconditioned gradient makes alone, at its best length, and the least and the largest eigenvalue of the preconditioned
matrix that 200 iterations find. The statistics of K-FAC are those of the same batch; Jacobi
takes their diagonal. Written to benchmarks/results/preconditioners.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.suite.store import about
from torchnewton import vectors
from torchnewton.curvature import KFAC
from torchnewton.solvers import Jacobi, Nystrom, Status
from torchnewton.train.data import load

ROOT = Path(__file__).parent.parent
BATCH, STEPS, DAMPING = 512, 100, 1e-3
MAX_ITERATIONS = 500
RITZ = 200
STATISTICS = 20


def network(sizes: list[int], activation: type[nn.Module]) -> nn.Module:
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def classifier_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def autoencoder_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Squared error, summed over the pixels, averaged over the images."""
    return F.mse_loss(model(x), x.flatten(1), reduction="sum") / len(x)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor, Tensor], Tensor]]] = {
    "MLP 784-1000-1000-10, ReLU": (lambda: network([784, 1000, 1000, 10], nn.ReLU), classifier_loss),
    "autoencoder 784-250-30-250-784, sigmoid": (
        lambda: network([784, 250, 30, 250, 784], nn.Sigmoid),
        autoencoder_loss,
    ),
}


def trained(name: str, x: Tensor, y: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network after its steps, and its loss on the batch that comes next."""
    torch.manual_seed(0)
    make, loss = CASES[name]
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = zip(x.split(BATCH), y.split(BATCH), strict=True)
    for _ in range(STEPS):
        xs, ys = next(batches)
        optimizer.zero_grad()
        loss(model, xs, ys).backward()
        optimizer.step()
    xs, ys = next(batches)
    return model, lambda: loss(model, xs, ys)


@dataclass(frozen=True)
class Fallen:
    """Stops a solver when the quadratic model has fallen by `target`."""

    target: float

    def check(self, model: Sequence[float], residual: Sequence[Tensor]) -> Status | None:
        return Status.PROGRESS if model[-1] <= -self.target else None


def kfac(tape: tn.Tape, **arguments: Any) -> KFAC:
    found = KFAC(statistics_every=1, decay=1.0, **arguments)
    for _ in range(STATISTICS):
        found.update(tape)
    return found


def extremes(A: Any, b: vectors.Vector, M: Any) -> tuple[float, float]:
    """The least and the largest Ritz value of MA, from the coefficients of CG."""
    alphas: list[float] = []
    betas: list[float] = []
    r = b
    z = b if M is None else M @ b
    p, rz = z, vectors.dot(b, z)
    for _ in range(RITZ):
        moved = A @ p
        alphas.append(rz / vectors.dot(p, moved))
        r = vectors.add(r, moved, -alphas[-1])
        z = r if M is None else M @ r
        rz, before = vectors.dot(r, z), rz
        betas.append(rz / before)
        p = vectors.add(z, p, betas[-1])
    a, beta = torch.tensor(alphas, dtype=torch.float64), torch.tensor(betas, dtype=torch.float64)
    diagonal = 1 / a
    diagonal[1:] += beta[:-1] / a[:-1]
    beside = beta[:-1].sqrt() / a[:-1]
    values = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1))
    return float(values[0]), float(values[-1])


def compare(name: str, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    model, closure = trained(name, x, y)
    tape = tn.record(closure, list(model.parameters()))
    G = tn.GaussNewton(tape)
    A, b = G + DAMPING, vectors.scale(tape.gradient, -1.0)
    curvature = vectors.dot(b, G @ b) / vectors.dot(b, b)
    print(f"{name}: loss {float(tape.loss):.4g}, λ = {DAMPING}, gᵀGg / gᵀg = {curvature:.3g}", flush=True)
    diagonal = kfac(tape).approximation.diagonal().value
    preconditioners: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "Jacobi": lambda: Jacobi(diagonal, DAMPING),
        "Jacobi, exponent 0.75": lambda: Jacobi(diagonal, DAMPING, exponent=0.75),
        "K-FAC": lambda: kfac(tape).inverse(DAMPING),
        "K-FAC, all eigenpairs": lambda: kfac(tape, share=1.0).inverse(DAMPING),
        "K-FAC, λ × 10": lambda: kfac(tape).inverse(10 * DAMPING),
        "Nyström, rank 50": lambda: Nystrom.sketch(G, tape.params, 50, DAMPING),
        "Nyström, rank 100": lambda: Nystrom.sketch(G, tape.params, 100, DAMPING),
    }
    minimum = 0.5 * vectors.dot(b, tn.CG(rtol=1e-5, max_iterations=2 * MAX_ITERATIONS).solve(A, b).solution)
    solvers = {
        "to 90 %": tn.CG(rtol=0.0, max_iterations=MAX_ITERATIONS, stop=Fallen(0.9 * minimum)),
        "to 99 %": tn.CG(rtol=0.0, max_iterations=MAX_ITERATIONS, stop=Fallen(0.99 * minimum)),
        "to residual 1e-3": tn.CG(rtol=1e-3, max_iterations=MAX_ITERATIONS),
    }
    heads = "".join(f"{title:>18}" for title in solvers)
    print(f"{'':24}{'alone':>8}{heads}{'least':>12}{'largest':>12}", flush=True)
    found = {}
    for title, make in preconditioners.items():
        M = make()
        d = b if M is None else M @ b
        alone = 0.5 * vectors.dot(b, d) ** 2 / vectors.dot(d, A @ d) / minimum
        counts = {name: cg.solve(A, b, preconditioner=M).num_iterations for name, cg in solvers.items()}
        least, largest = extremes(A, b, M)
        found[title] = {"alone": alone, **counts, "least eigenvalue": least, "largest": largest}
        texts = [f"{count:18}" for count in counts.values()]
        print(f"{title:24}{alone:8.1%}{''.join(texts)}{least:12.2g}{largest:12.2g}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    data = load("mnist", parser.parse_args().data_dir)
    torch.set_num_threads(1)
    x = data.x_train.to(torch.get_default_dtype())
    x, y = x[: (STEPS + 1) * BATCH], data.y_train[: (STEPS + 1) * BATCH]
    results = {name: compare(name, x, y) for name in CASES}
    path = ROOT / "benchmarks/results/preconditioners.json"
    text = json.dumps({"about": about(), "damping": DAMPING, "cases": results}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
