"""What `torchnewton plan` predicts beside what 1, 2 and 4 processes take, on links of known bandwidth.

    python -m benchmarks.plan [--steps 6]

Run as root, every rank has a network namespace of its own, all on one bridge, and `tc tbf` holds each rank's sending to
the stated bandwidth; otherwise ranks talk over the loopback, and only that row is written. Latency is that of small
all-reduces, measured before; gradients are timed on all ranks at once, since they share the cores. Writes
benchmarks/results/plan.json and the table in docs/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import torchnewton as tn
from torchnewton.train.exchanges import Network, Step
from torchnewton.train.loop import loss_function
from torchnewton.train.plan import Planner, planner

ROOT = Path(__file__).parent.parent
MODEL, SAMPLES, ITERATIONS = "784-256-10", 4096, 20
BANDWIDTHS = {"100 Mbit/s": (12.5e6, "64kb"), "1 Gbit/s": (125e6, "512kb")}  # bytes a second, and the burst of tbf
RANKS = (1, 2, 4)
MODES = ("exact", "diagonalized", "quorum")
PREFIX = "tn-plan"


def sh(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def links(bandwidth: float | None, burst: str) -> Iterator[None]:
    """Namespaces on a bridge; none without a bandwidth."""
    if bandwidth is None:
        yield
        return
    try:
        sh("ip", "link", "add", PREFIX, "type", "bridge")
        sh("ip", "link", "set", PREFIX, "up")
        for rank in range(max(RANKS)):
            name, outside = f"{PREFIX}-{rank}", f"{PREFIX}-v{rank}"
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            sh("ip", "link", "set", outside, "master", PREFIX, "up")
            sh("ip", "-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            rate = ["rate", f"{round(8 * bandwidth)}bit", "burst", burst, "latency", "500ms"]
            sh("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *rate)
        yield
    finally:
        for rank in range(max(RANKS)):
            subprocess.run(["ip", "link", "del", f"{PREFIX}-v{rank}"], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", f"{PREFIX}-{rank}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", PREFIX], check=False, capture_output=True)


def latency() -> float:
    """Of a message between two ranks, from all-reduces of one number: 2(R − 1) messages one after another."""
    x, times = torch.zeros(1), []
    for _ in range(60):
        start = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - start)
    return sorted(times[10:])[25] / (2 * (dist.get_world_size() - 1))


def measure(mode: str, plan: Planner, steps: int) -> dict[str, Any]:
    """Seconds of a step beside the prediction of the slowest rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    row = plan.row(mode, size)
    x, y = (t.tensor_split(size)[rank] for t in (plan.data.x_train, plan.data.y_train))
    torch.manual_seed(0)
    how: dict[str, Any] = {"max_iterations": ITERATIONS, "rtol": 0.0}
    if size > 1:
        how["process_group"] = dist.group.WORLD
    for layer in plan.model:
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    params = plan.model.parameters()
    if mode == "exact":
        optimizer: tn.Newton = tn.NewtonCG(params, **how)
    else:
        optimizer = tn.DistributedNewton(params, quorum=tn.Quorum(1.0) if mode == "quorum" else None, **how)

    def closure() -> Tensor:
        return loss_function(plan.model(x), y)

    seconds = []
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        optimizer.step(closure)
        seconds.append(time.perf_counter() - start)
    report = optimizer.report
    every: list[Any] = [None] * size
    dist.all_gather_object(every, (row.computing, row.exchanging))
    return {
        "mode": mode,
        "ranks": size,
        "measured": sorted(seconds[1:])[(steps - 1) // 2],
        "predicted": max(computing + exchanging for computing, exchanging in every),
        "computing": max(computing for computing, _ in every),
        "exchanging": row.exchanging,
        "bytes": (row.num_bytes, report.bytes_communicated),
        "messages": (row.messages, report.messages),
        "evaluations": report.loss_evaluations,
        "iterations": report.inner_iterations,
    }


def work(rank: int, size: int, address: str, bandwidth: float, steps: int, path: str) -> None:
    """All modes on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=size)
    network = Network(bandwidth, latency() if size > 1 else 0.0)
    step = Step(0, iterations=ITERATIONS, num_samples=SAMPLES)
    rows = []
    for mode in MODES:
        dist.barrier()
        plan = planner(MODEL, None, step, network, None)  # which times gradients on all ranks at once
        rows.append({**measure(mode, plan, steps), "latency": network.latency})
    if rank == 0:
        Path(path).write_text(json.dumps(rows))
    dist.destroy_process_group()


def launched(size: int, bandwidth: float | None, steps: int) -> list[dict[str, Any]]:
    """The rows of one number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        path, port = f"{folder}/rows.json", 29600 + size
        host = "127.0.0.1" if bandwidth is None else "10.77.0.1"
        jobs = []
        for rank in range(size):
            where = [] if bandwidth is None else ["ip", "netns", "exec", f"{PREFIX}-{rank}"]
            given = ["--work", str(rank), str(size), f"{host}:{port}", str(bandwidth or 10e9), path]
            command = [*where, sys.executable, "-m", "benchmarks.plan", "--steps", str(steps), *given]
            env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo" if bandwidth is None else "eth0"}
            jobs.append(subprocess.Popen(command, env=env, cwd=ROOT))
        codes = [job.wait() for job in jobs]
        if any(codes):
            raise SystemExit("A rank has failed.")
        rows: list[dict[str, Any]] = json.loads(Path(path).read_text())
        return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/distributed.md."""
    lines = [
        "| links | mode | ranks | kB a step | messages | predicted: computing + exchanges | measured | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        off = row["predicted"] / row["measured"] - 1
        sent = f"{row['bytes'][1] / 1e3:.0f} | {row['messages'][1]}"
        lines.append(
            f"| {row['network']} | {row['mode']} | {row['ranks']} | {sent} | "
            f"{row['computing']:.3f} + {row['exchanging']:.3f} = {row['predicted']:.3f} s | {row['measured']:.3f} s | "
            f"{100 * off:+.0f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", nargs=5, metavar=("RANK", "SIZE", "ADDRESS", "BANDWIDTH", "PATH"))
    given = parser.parse_args()
    if given.work:
        rank, size, address, bandwidth, path = given.work
        work(int(rank), int(size), address, float(bandwidth), given.steps, path)
        return
    rows = []
    networks: dict[str, tuple[float | None, str]] = dict(BANDWIDTHS) if os.geteuid() == 0 else {"loopback": (None, "")}
    for name, (bandwidth, burst) in networks.items():
        with links(bandwidth, burst):
            for size in RANKS:
                if size > 1 or name == next(iter(networks)):
                    shown = name if size > 1 else "none"
                    rows += [{"network": shown, **row} for row in launched(size, bandwidth, given.steps)]
                    print(table(rows[-len(MODES) :]).split("\n", 2)[2], flush=True)
    (ROOT / "benchmarks/results/plan.json").write_text(json.dumps(rows, indent=1) + "\n")
    page = ROOT / "docs/distributed.md"
    before, _, rest = page.read_text().partition("<!-- plan -->\n")
    after = rest.partition("<!-- end of plan -->")[2]
    page.write_text(f"{before}<!-- plan -->\n{table(rows)}\n<!-- end of plan -->{after}")


if __name__ == "__main__":
    main()
