"""`torchnewton plan`: what is asked, and the table and the picture of the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from torchnewton.train.checkpoint import check_free, write_atomically
from torchnewton.train.data import load
from torchnewton.train.display import duration
from torchnewton.train.errors import UsageError
from torchnewton.train.exchanges import Network, Step
from torchnewton.train.figures import STYLE, wrapped
from torchnewton.train.plan import Row, is_sizes, planner
from torchnewton.train.runs import MOST

HEADERS = ["ranks", "mode", "MB", "messages", "computing", "exchanges", "step", ""]
MAX_BANDWIDTH, MIN_LATENCY, MAX_LATENCY = 10_000.0, 0.01, 1e9  # Gbit/s, µs
MAX_RANKS, MAX_SLOW, MIN_FLOPS = 10**6, 1e6, 1e-3  # GFLOP/s
PICTURES = (".svg", ".png", ".pdf")
TICKS = 12  # at most so many ranks have their own
_COLOURS = ["#1f5fd0", "#d9480f", "#2b8a3e", "#868e96"]


@dataclass(frozen=True)
class Request:
    """The options of the command, in the units of its help."""

    model: str = "784-1000-10"
    data: str | None = None
    data_dir: str = "data"
    batch_size: int = 4096
    ranks: str = "1,2,4,8,16,32,64,128,256,512,1024"
    bandwidth: float = 10.0
    latency: float = 50.0
    flops: str = "auto"
    iterations: int = 20
    slow: float = 1.0
    threads: int = 1

    @property
    def title(self) -> str:
        """The task and the network."""
        task = self.model if self.data is None else f"{self.model} on {self.data}"
        slow = f", one rank {self.slow:g}× slow" if self.slow > 1 else ""
        samples = f"{self.batch_size:,} samples, {self.iterations} CG iterations"
        return f"{task}, {samples}, {self.bandwidth:g} Gbit/s, {self.latency:g} µs{slow}"


def predict(request: Request) -> list[Row]:
    """Every mode for every number of ranks.

    Raises:
        UsageError: for an option that cannot be understood.
    """
    ranks = _ranks(request.ranks)
    _check_network(request.bandwidth, request.latency)
    rate = None if request.flops == "auto" else 1e9 * _flops(request.flops)
    if not 1 <= request.slow <= MAX_SLOW:
        raise UsageError(f"--slow {request.slow:g}: give a number from 1 to {MAX_SLOW:,g}.")
    if not 1 <= request.threads <= MOST["threads"]:
        raise UsageError(f"--threads is {request.threads}: it has to be from 1 to {MOST['threads']}.")
    if request.data is None and not is_sizes(request.model):
        raise UsageError(f"--model {request.model} needs --data; layer sizes as in 784-1000-10 do not.")
    torch.set_num_threads(request.threads)
    data = None if request.data is None else load(request.data, Path(request.data_dir))
    step = Step(0, iterations=request.iterations, num_samples=request.batch_size)
    plan = planner(
        request.model, data, step, Network(request.bandwidth * 1e9 / 8, request.latency * 1e-6), rate, request.slow
    )
    return [plan.row(mode, n) for n in ranks for mode in (plan.modes if n > 1 else ["exact"])]


def _check_network(bandwidth: float, latency: float) -> None:
    """No network is beyond these limits: a number that is was meant in another unit."""
    if not (bandwidth > 0 and latency >= 0):
        raise UsageError("--bandwidth must be positive and --latency must not be negative.")
    if bandwidth > MAX_BANDWIDTH:
        raise UsageError(f"--bandwidth {bandwidth:g}: it is in Gbit/s, at most {MAX_BANDWIDTH:,g}; 1e9 bit/s are 1.")
    if latency > MAX_LATENCY:
        raise UsageError(f"--latency {latency:g}: it is in µs, at most {MAX_LATENCY:,g}.")
    if 0 < latency < MIN_LATENCY:
        raise UsageError(f"--latency {latency:g}: it is in µs, at least {MIN_LATENCY:g}, or 0; 1e-4 s are 100.")


def _ranks(text: str) -> list[int]:
    """The numbers of a list, each once, in their order."""
    for word in text.split(","):
        if not (word.strip().isdecimal() and 1 <= int(word) <= MAX_RANKS):
            raise UsageError(f"--ranks {word or text}: give whole numbers from 1 to {MAX_RANKS:,}, as in 1,2,4.")
    return sorted({int(word) for word in text.split(",")})


def _flops(word: str) -> float:
    try:
        found = float(word)
    except ValueError:
        found = 0.0
    if not MIN_FLOPS <= found < math.inf:
        raise UsageError(f"--flops {word}: give a positive number, or auto; at least {MIN_FLOPS:g} GFLOP/s.")
    return found


def check_picture(path: Path) -> None:
    """Refuses a name without a known ending, and a folder that is not there or cannot be written."""
    if path.suffix not in PICTURES or path.is_dir():
        raise UsageError(f"--out {path}: choose a file name that ends with {', '.join(PICTURES)}.")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: there is no folder {path.parent}.")
    check_free(path.parent, overwrite=True)


def rows(found: Sequence[Row]) -> list[list[str]]:
    """The table, by `HEADERS`."""
    best = fastest(found)
    return [
        [
            str(r.ranks),
            r.mode,
            f"{r.num_bytes / 1e6:,.3f}",
            f"{r.messages:,}",
            *(duration(t) for t in (r.computing, r.exchanging, r.seconds)),
            "fastest" if best[r.ranks] is r else "",
        ]
        for r in found
    ]


def fastest(found: Sequence[Row]) -> dict[int, Row]:
    """The row of the mode that wins, by ranks."""
    best: dict[int, Row] = {}
    for row in found:
        if row.ranks not in best or row.seconds < best[row.ranks].seconds:
            best[row.ranks] = row
    return best


def draw_plan(found: Sequence[Row], title: str, path: Path) -> None:
    """Seconds of a step against ranks, a line for each mode; dashed what of it is computing."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for mode, colour in zip(dict.fromkeys(row.mode for row in found), _COLOURS, strict=False):
            line = [row for row in found if row.mode == mode]
            ranks = [row.ranks for row in line]
            width = 4.0 if mode == "diagonalized" else 1.6  # the quorum's line lies upon it
            axes.plot(ranks, [r.seconds for r in line], color=colour, marker="o", ms=3, linewidth=width, label=mode)
            axes.plot(ranks, [row.computing for row in line], color=colour, linestyle="--", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        ranks = sorted({row.ranks for row in found})
        if len(ranks) <= TICKS:
            axes.set_xticks(ranks, [str(n) for n in ranks])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("ranks")
        axes.set_ylabel("seconds a step (dashed: computing)")
        axes.set_title(wrapped(title, 7.5), fontsize=10, parse_math=False)
        axes.legend(frameon=False)
        write_atomically(path, lambda p: figure.savefig(p, format=path.suffix[1:]))
