"""Peak memory of every path, each in a process of its own.

    python -m benchmarks.memory NETWORK PATH

prints how many bytes the process grew by at its peak.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.cases import CASES, CNN, MLP, TRANSFORMER, Case
from torchnewton.train.loop import loss_function

DAMPING = 1e-3
STATUS = Path("/proc/self/status")


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return torch.autograd.grad(loss_function(model(x), y), list(model.parameters()))


def record(model: nn.Module, x: Tensor, y: Tensor) -> tn.Tape:
    tape = tn.record(lambda: loss_function(model(x), y), list(model.parameters()))
    _ = tape.gradient
    return tape


def kept(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    tape = record(model, x, y)
    G = tn.GaussNewton(tape, tn.Jacobian(tape))
    return G @ (G @ tape.gradient)


def explicit(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    tape = record(model, x, y)
    G = tn.GaussNewton(tape, tn.LayerJacobian(tape))
    return G @ (G @ tape.gradient)


def dual(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    tape = record(model, x, y)
    return tn.Dual(rtol=1e-3).solve(tn.GaussNewton(tape) + DAMPING, tape.descent)


def curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    from benchmarks import peers

    operator, g = peers.gauss_newton(model, x, y), gradient(model, x, y)
    return peers.product(operator, peers.product(operator, g))


PATHS: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "gradient": gradient,
    "recording": record,
    "kept products": kept,
    "explicit products": explicit,
    "curvlinops products": curvlinops,
    "dual solve, batch 64": dual,
    "gradient, batch 64": gradient,
}
NETWORKS = {"mlp": MLP, "cnn": CNN, "transformer": TRANSFORMER}
LEFT_OUT = {"transformer": ("explicit products", "dual solve, batch 64", "gradient, batch 64")}


def measure_memory() -> list[dict[str, Any]]:
    """Bytes by network and path; empty where the system does not tell."""
    if not STATUS.is_file():
        return []
    rows = []
    for short, name in NETWORKS.items():
        found = {path: _in_child(short, path) for path in PATHS if path not in LEFT_OUT.get(short, ())}
        rows.append({"network": name, "bytes": found})
    return rows


def _in_child(network: str, path: str) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", network, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return int(done.stdout)


def _status(name: str) -> int:
    """Bytes, from a line like `VmHWM:   1234 kB`."""
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def main() -> None:
    torch.set_num_threads(1)
    network, path = sys.argv[1:]
    torch.manual_seed(0)
    model, x, y = case = CASES[NETWORKS[network]]()
    f = PATHS[path]
    small: Case = (case[0], x[:2], y[:2])
    f(*small)  # libraries loaded, code paths taken
    count = 64 if "batch 64" in path else len(x)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = _status("VmRSS")
    f(model, x[:count], y[:count])
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main()
