"""Times curvature products, damped directions, the choices of `Auto` and plane steps, and measures memory.

    python -m benchmarks.products [--data-dir DIR] [--part products --part directions …] [--quick]

One thread, CPU time, medians of interleaved measurements, beside curvlinops on the same model and batch. Prints the
tables, and writes them to benchmarks/results/products.json and, with the other results, to docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchnewton as tn
from benchmarks import choices, directions, memory, peers, plane_step, product_tables, timing
from benchmarks.cases import CASES, images
from benchmarks.product_criteria import product_verdicts
from benchmarks.suite import report
from benchmarks.suite.store import about
from benchmarks.suite.tasks import TASKS
from torchnewton.curvature.layer_jacobian.layers import Paired
from torchnewton.train.loop import loss_function

ROOT = Path(__file__).parent.parent
MANY = 1000  # products: then layer factors are taken wherever they can


def measure_products(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, case in CASES.items():
        torch.manual_seed(0)
        work, counts = operations(*case())
        rows.append({"network": name, "seconds": timing.measure(work, rounds), "counts": counts})
    return rows


def operations(model: nn.Module, x: Tensor, y: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What is timed, by the names of the columns, and the counts of matrix products."""
    params = list(model.parameters())

    def loss() -> Tensor:
        return loss_function(model(x), y)

    def factors() -> tn.GaussNewton:
        G = tn.GaussNewton(tn.record(loss, params))
        G.expect(MANY)
        G @ v
        return G

    v = [torch.randn_like(p) for p in params]
    kept = tn.GaussNewton(tape := tn.record(loss, params), tn.Jacobian(tape))
    peer = peers.gauss_newton(model, x, y)
    work: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(loss(), params),
        "evaluation": torch.no_grad()(loss),
        "record": lambda: tn.record(loss, params).gradient,
        "kept": lambda: kept @ v,
        "curvlinops": lambda: peers.product(peer, v),
    }
    counts = gemm_counts(tape)
    if "explicit" in (explicit := factors()).path:
        work["explicit"] = lambda: explicit @ v
        work["first explicit"] = factors
    else:
        del counts["explicit"]
    reference = work["curvlinops"]()
    for name in {"kept", "explicit"} & work.keys():
        torch.testing.assert_close(work[name](), reference, rtol=1e-3, atol=1e-5)
    return work, counts


def gemm_counts(tape: tn.Tape) -> dict[str, float]:
    """Matrix products of linear and convolutional layers, as a multiple of those of a gradient.

    A gradient takes three of them a layer, a product by kept double backward four, one by layer factors two. Without a
    derivative in its input, the first layer takes one less in a gradient and two less in a kept product.
    """
    layers = [layer for layer in tn.LayerJacobian(tape).layers if isinstance(layer, Paired)]
    flops = sum(layer.forward_flops for layer in layers)
    first = sum(layer.forward_flops for layer in layers if not layer.arguments["input"].requires_grad)
    gradient = 3 * flops - first
    return {"explicit": 2 * flops / gradient, "kept": (4 * flops - 2 * first) / gradient}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="the folder of the MNIST files")
    parser.add_argument("--part", action="append", help="measure this again and keep the others; default: all")
    parser.add_argument("--quick", action="store_true", help="one round each, written to runs/quick-benchmarks")
    args = parser.parse_args()
    peers.require()
    torch.set_num_threads(1)
    folder = ROOT / "runs/quick-benchmarks" if args.quick else ROOT
    data, rounds = images(args.data_dir), 1 if args.quick else None
    parts: dict[str, Callable[[], Any]] = {
        "memory": memory.measure_memory,  # before freed memory is kept
        "products": lambda: measure_products(rounds or 3 * timing.ROUNDS),  # some limits are near
        "directions": lambda: directions.measure_directions(data, rounds or directions.ROUNDS),
        "choices": lambda: [choices.measure_row(row, rounds or choices.ROUNDS) for row in choices.GRID],
        "plane_steps": lambda: plane_step.measure_plane_steps(data),
    }
    path = folder / "benchmarks/results/products.json"
    results = json.loads(path.read_text(encoding="utf-8")) if args.part and path.is_file() else {}
    results |= {"about": {**about(), "curvlinops": peers.VERSION}, "images": data.source}
    for name, measure in parts.items():
        if name != "memory":
            timing.keep_freed_memory()
        if not args.part or name in args.part:
            print(f"Measuring {name} …", flush=True)
            results[name] = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    results |= report.preconditioners(folder)
    print("\n\n".join(product_tables.sections(results)))
    print("\n".join(report.line(verdict) for verdict in product_verdicts(results)))
    print(f"Written: {report.write(list(TASKS.values()), 3, folder)}")


if __name__ == "__main__":
    main()
