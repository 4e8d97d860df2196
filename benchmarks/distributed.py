"""Exact, diagonalized and quorum Newton on four processes, healthy and with one slow rank.

    python -m benchmarks.distributed --data-dir DIR [--steps 20] [--ranks 4]

Reads DIR/libsvm/letter.scale, DIR/libsvm/pendigits and the MNIST files in DIR; writes
benchmarks/results/distributed.json, the table in docs/distributed.md and docs/figures/straggler.svg. Processes share
the cores of one machine, so a product with the curvature waits 10 ms on every rank, as if it were that dear, and 100 ms
on the slow one: the seconds compare the modes with each other, not with a machine for each rank.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from torchnewton.train.data import load

ROOT = Path(__file__).parent.parent
SLOW = 10
TASKS = {"letter": "libsvm:{}/libsvm/letter.scale", "pendigits": "libsvm:{}/libsvm/pendigits", "mnist": "mnist"}
CG = {"max_iterations": 30, "rtol": 0.1}
MODES: dict[str, Callable[..., tn.Newton]] = {
    "exact": partial(tn.NewtonCG, **CG),
    "diagonalized": partial(tn.DistributedNewton, **CG),
    "quorum": partial(tn.DistributedNewton, **CG, quorum=tn.Quorum(share=0.5, min_iterations=1)),
}


class DearGaussNewton(tn.GaussNewton):
    """Products take at least `pause` seconds."""

    pause = 0.01

    def apply(self, v: Any) -> Any:
        time.sleep(self.pause)
        return super().apply(v)


class SlowGaussNewton(DearGaussNewton):
    """They take ten times as long."""

    pause = SLOW * DearGaussNewton.pause


def train(task: str, data_dir: str, mode: str, slow: bool, steps: int, until: float | None = None) -> dict[str, Any]:
    """Steps on the first 4,000 training samples, what they took, and how many it takes to come to the loss `until`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    data = load(TASKS[task].format(data_dir), Path(data_dir))
    x = data.x_train[:4000].flatten(1).tensor_split(size)[rank]
    y = data.y_train[:4000].tensor_split(size)[rank]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.Sigmoid(), nn.Linear(64, data.num_classes))
    optimizer = MODES[mode](model.parameters(), process_group=dist.group.WORLD)
    optimizer.curvature = SlowGaussNewton if slow and rank == 1 else DearGaussNewton

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    def loss_of_all() -> float:
        return float(optimizer.data_parallel.processes.sum([closure().detach() / size])[0])

    dist.barrier()
    num_bytes, messages, seconds = [], [], []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.step(closure)
        seconds.append(time.perf_counter() - start)
        num_bytes.append(optimizer.report.bytes_communicated)
        messages.append(optimizer.report.messages)
    found = loss_of_all()
    needed, loss = steps, found
    while until is not None and loss > until * (1 + 1e-6) and needed < 5 * steps:
        optimizer.step(closure)
        needed, loss = needed + 1, loss_of_all()
    return {
        "task": task,
        "mode": mode,
        "slow rank": slow,
        "loss": found,
        "steps": needed,
        "bytes": sum(num_bytes) / steps,
        "messages": sum(messages) / steps,
        "seconds": sorted(seconds)[steps // 2],
        "solver": optimizer.report.solver,
    }


def work(rank: int, size: int, folder: str, data_dir: str, steps: int) -> None:
    """All runs on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    rows = []
    for task in TASKS:
        train(task, data_dir, "exact", False, 1)
        for mode in MODES:
            for slow in (False, True):
                until = rows[-1]["loss"] if slow else None
                rows.append(train(task, data_dir, mode, slow, steps, until))
                if rank == 0:
                    print({k: v for k, v in rows[-1].items() if k != "solver"}, flush=True)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/distributed.md."""
    lines = [
        "| task | mode | loss after 20 steps | kB a step | messages a step | s a step | the same with a slow rank | "
        "steps with it to the loss without it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for healthy, slow in zip(rows[::2], rows[1::2], strict=True):
        ratio = slow["seconds"] / healthy["seconds"]
        lines.append(
            f"| {healthy['task']} | {healthy['mode']} | {healthy['loss']:.4f} | {healthy['bytes'] / 1e3:.0f} | "
            f"{healthy['messages']:.0f} | {healthy['seconds']:.3f} | {slow['seconds']:.3f} s ({ratio:.1f}×), "
            f"loss {slow['loss']:.4f} | {slow['steps']}, {ratio * slow['steps'] / 20:.1f}× the time |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds a step with a slow rank over those without."""
    fig, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    for i, mode in enumerate(MODES):
        found = [row for row in rows if row["mode"] == mode]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(found[::2], found[1::2], strict=True)]
        axis.bar([k + 0.27 * (i - 1) for k in range(len(TASKS))], ratios, width=0.25, label=mode)
    axis.axhline(1.5, color="0.5", linewidth=0.8)
    axis.set_xticks(range(len(TASKS)), list(TASKS))
    axis.set_ylabel("step time, one rank 10× slow / healthy")
    axis.legend(frameon=False)
    fig.savefig(path)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    given = parser.parse_args()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports much, once instead of on every rank
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        jobs = [(rank, given.ranks, folder, given.data_dir, given.steps) for rank in range(given.ranks)]
        children = [context.Process(target=work, args=job) for job in jobs]
        for child in children:
            child.start()
        for child in children:
            child.join()
        rows = json.loads(Path(folder, "rows.json").read_text())
    (ROOT / "benchmarks/results/distributed.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, ROOT / "docs/figures/straggler.svg")
    page = ROOT / "docs/distributed.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->")[2]
    page.write_text(f"{before}<!-- table -->\n{table(rows)}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
