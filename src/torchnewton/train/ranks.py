"""Several processes for one run: how they start, and what they must agree on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from torchnewton.distributed import DataParallel
from torchnewton.optim import Newton
from torchnewton.train.errors import UsageError

if TYPE_CHECKING:
    import torch

RESTARTS = 3  # of a run that has a folder to continue from
TIMEOUT = 300.0  # seconds that a rank waits for another


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and the place of this one; a single process without `parallel`."""

    rank: int = 0
    size: int = 1
    parallel: DataParallel | None = None

    def give(self, optimizer: torch.optim.Optimizer, method: str) -> None:
        """Let the optimizer sum over the samples of all ranks."""
        if self.parallel is None:
            return
        if not isinstance(optimizer, Newton):
            raise UsageError(f"--ranks is for Newton's methods: {method} runs in one process.")
        optimizer.data_parallel = self.parallel

    def part(self, index: torch.Tensor) -> torch.Tensor:
        """This rank's samples of a batch."""
        return index.tensor_split(self.size)[self.rank]

    def first(self, *numbers: float) -> list[float]:
        """The numbers of rank 0, so that all take the same way."""
        return list(numbers) if self.parallel is None else self.parallel.processes.numbers_of_first(numbers)

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return flag if self.parallel is None else any(row[0] for row in self.parallel.processes.table([flag]))


def is_launched() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_restarted() -> bool:
    """Whether torchrun has started it anew after a failure."""
    return is_launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def join(device: str) -> Ranks:
    """Meet the other processes that torchrun has started."""
    if not is_launched():
        return Ranks()
    if device != "cpu":
        raise UsageError(f"--device {device} is for one process: several ranks run on the CPU.")
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://"))
        # After a restart the store still holds the addresses of processes that are gone.
        store = PrefixStore(f"torchnewton-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        wait = timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    return Ranks(dist.get_rank(), dist.get_world_size(), DataParallel(timeout=TIMEOUT))


def launch(arguments: Sequence[str], ranks: int, restarts: int) -> int:
    """Run this command line in `ranks` processes under torchrun; returns the exit code."""
    how = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "torchnewton", *arguments]
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # torchrun has got it, too
            return process.wait()
