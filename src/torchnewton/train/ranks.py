"""Several processes for one run: how they start, and what they must agree on."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.rendezvous import rendezvous
from torch.distributed.run import config_from_args, parse_args

from torchnewton.distributed import DataParallel
from torchnewton.optim import Newton
from torchnewton.train.errors import UsageError

if TYPE_CHECKING:
    import torch

RESTARTS = 3  # of a run that has a folder to continue from
ENDING = "TORCHNEWTON_ENDING"  # the file in which a rank says how it has ended
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
        _newton(optimizer, method).data_parallel = self.parallel

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


def check_ranks(device: str, optimizer: torch.optim.Optimizer, method: str) -> None:
    """Refuses in one process what every rank would refuse."""
    _check_device(device)
    _newton(optimizer, method)


def _check_device(device: str) -> None:
    if device != "cpu":
        raise UsageError(f"--device {device} is for one process: several ranks run on the CPU.")


def _newton(optimizer: torch.optim.Optimizer, method: str) -> Newton:
    if not isinstance(optimizer, Newton):
        raise UsageError(f"--ranks is for Newton's methods: {method} runs in one process.")
    return optimizer


def join(device: str) -> Ranks:
    """Meet the other processes that torchrun has started."""
    if not is_launched():
        return Ranks()
    _check_device(device)
    if not dist.is_initialized():
        store, rank, size = next(rendezvous("env://"))
        # After a restart the store still holds the addresses of processes that are gone.
        store = PrefixStore(f"torchnewton-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        wait = timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    return Ranks(dist.get_rank(), dist.get_world_size(), DataParallel(timeout=TIMEOUT))


def launch(arguments: Sequence[str], ranks: int, restarts: int) -> int:
    """Run this command line in `ranks` processes, as torchrun does; returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun sets it and says so
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.ERROR)
    how = ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--rdzv-backend", "c10d"]
    endpoint = ["--rdzv-endpoint", "localhost:0", "--rdzv-id", str(uuid.uuid4())]
    config, command, rest = config_from_args(parse_args([*how, *endpoint, "-m", "torchnewton", *arguments]))
    with TemporaryDirectory() as folder:
        ending = Path(folder) / "ending"
        os.environ[ENDING] = str(ending)
        try:
            elastic_launch(config, command)(*rest)
        except SignalException:
            return 130
        except ChildFailedError as error:
            if not ending.exists():
                raise UsageError(f"Rank {error.get_first_failure()[0]} has failed: see above.") from error
        code, _, message = ending.read_text(encoding="utf-8").partition("\n") if ending.exists() else ("0", "", "")
    if message:
        raise UsageError(message)
    return int(code)


def has_ended() -> bool:
    """Whether a rank has said how it has ended: what fails in the others then is that it is gone."""
    return Path(os.environ.get(ENDING, "")).is_file()


def leave(code: int, message: str = "") -> bool:
    """Tells `launch` how this rank ends, unless another has; false where nobody is to be told.

    torchrun takes every exit code but 0 for a failure and starts all ranks anew.
    """
    if ENDING not in os.environ or not is_launched():
        return False
    with suppress(FileExistsError), Path(os.environ[ENDING]).open("x", encoding="utf-8") as file:
        file.write(f"{code}\n{message}")
    return True
