"""What a rank holds in memory with the parameters on every rank and in parts, on one, two and four ranks.

    python -m benchmarks.sharding [--steps 4]

A network of 5.8 million parameters in float32 (23 MB a vector), 512 random samples spread over the ranks, `Newton` with
CG, momentum and Levenberg-Marquardt damping. Writes benchmarks/results/sharding.json and the table in
docs/distributed.md.

The bytes are those of all tensors that Python can reach in the middle of a solve, each memory once, in a product with
the curvature: parameters, optimizer state, other vectors in the form of the parameters, and what is whole for the time
of the step where parameters are in parts. The peak is by how much the process grows during the steps at most.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import torchnewton as tn

ROOT = Path(__file__).parent.parent
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SIZES = (1, 2, 4)
WIDTH, SAMPLES = 2048, 512


def memory(tensors: Iterable[Any]) -> dict[int, int]:
    """The bytes of each memory that plain tensors and the local parts of DTensors use."""
    local = (x.detach().to_local() if isinstance(x, DTensor) else x for x in tensors)
    storages = [x.untyped_storage() for x in local if x.layout is torch.strided and x.device.type == "cpu"]
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def reachable() -> list[Tensor]:
    """All tensors that Python can reach."""
    return [x for x in gc.get_objects() if issubclass(type(x), Tensor)]


class Watching:
    """CG that looks around in its last product."""

    def __init__(self) -> None:
        self.solver, self.held, self.in_parts = tn.CG(rtol=0.0, max_iterations=5), 0, 0

    def solve(self, A: Any, b: Any, x0: Any = None, preconditioner: Any = None) -> Any:
        apply = A.apply

        def watched(v: Any) -> Any:
            found = reachable()
            self.held = sum(memory(found).values())
            self.in_parts = sum(memory(x for x in found if isinstance(x, DTensor)).values())
            return apply(v)

        A.apply = watched
        try:
            return self.solver.solve(A, b, x0, preconditioner)
        finally:
            del A.apply  # a cycle, which would keep the step alive


def kilobytes(name: str) -> int:
    """A number of /proc/self/status."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def work(rank: int, size: int, cut: bool, folder: str, steps: int) -> None:
    """All steps on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.manual_seed(0)
    x, y = torch.randn(SAMPLES, 784).tensor_split(size)[rank], torch.randint(10, (SAMPLES,)).tensor_split(size)[rank]
    before = sum(memory(reachable()).values())
    model = nn.Sequential(
        nn.Linear(784, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)
    )  # fmt: skip
    solver = Watching()
    group = None if cut else dist.group.WORLD
    if cut:
        tn.shard(model)
    optimizer = tn.Newton(
        model.parameters(),
        solver=solver,
        damping=tn.LevenbergMarquardt(initial=1.0),
        momentum=0.5,
        process_group=group,
    )
    gc.collect()
    CLEAR.write_text("5")  # the peak begins anew
    resting = kilobytes("VmRSS")
    for _ in range(steps):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    params = sum(memory(model.parameters()).values())
    state = sum(memory(v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)).values())
    held = solver.held - before
    row = {
        "ranks": size,
        "in parts": cut,
        "parameters": params,
        "state": state,
        "vectors": (solver.in_parts if cut else held) - params - state,
        "whole": held - solver.in_parts if cut else 0,
        "peak": 1024 * (kilobytes("VmHWM") - resting),
        "bytes exchanged": optimizer.report.bytes_communicated,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(row))


def run(size: int, cut: bool, steps: int) -> dict[str, Any]:
    """The largest numbers of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        children = [context.Process(target=work, args=(rank, size, cut, folder, steps)) for rank in range(size)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        rows = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    return {key: max(row[key] for row in rows) for key in rows[0]}


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/distributed.md."""
    names = ["parameters", "state", "vectors", "whole", "peak"]
    lines = [
        "| ranks | parameters are | parameters | optimizer state | other vectors in a solve | whole, for the step | "
        "growth of the process at its peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = " | ".join(f"{row[name] / 1e6:.1f}" for name in names)
        kind = "in parts" if row["in parts"] else "on every rank"
        lines.append(f"| {row['ranks']} | {kind} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps
    rows = []
    for cut in (False, True):
        for size in SIZES:
            rows.append(run(size, cut, steps))
            print(rows[-1], flush=True)
    (ROOT / "benchmarks/results/sharding.json").write_text(json.dumps(rows, indent=1) + "\n")
    page = ROOT / "docs/distributed.md"
    before, _, rest = page.read_text().partition("<!-- sharding -->\n")
    after = rest.partition("<!-- end of sharding -->")[2]
    page.write_text(f"{before}<!-- sharding -->\n{table(rows)}\n<!-- end of sharding -->{after}")


if __name__ == "__main__":
    main()
