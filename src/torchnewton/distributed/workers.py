"""Vectors of m workers, cut into m slices: on m processes each owns one slice of all vectors, on one process all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from torchnewton.distributed.processes import HoldsGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Workers(Protocol):
    """m workers, some of them in this process; the same arithmetic on the same slices wherever they are."""

    num_workers: int
    local: list[int]  # the workers of this process
    bytes_sent: int  # by a worker to others; on one process what a worker would send

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """One small tensor of each local worker → those of all workers, in order."""
        ...

    def own_slices(self, vector: Tensor) -> list[Tensor]:
        """Of a vector that every process has the slices that are owned here."""
        ...

    def to_slices(self, rows: Tensor) -> list[Tensor]:
        """The local workers' vectors (local × n) → of each slice owned here all workers' parts (m × ⌈n/m⌉)."""
        ...

    def from_slices(self, slices: list[Tensor], size: int) -> Tensor:
        """The slices of one vector that are owned here → the whole vector of `size` entries."""
        ...


class OneProcess:
    """All workers here, one after another."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers, self.local, self.bytes_sent = num_workers, list(range(num_workers)), 0

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """As they are."""
        self.bytes_sent += _others(parts[0], self.num_workers)
        return parts

    def own_slices(self, vector: Tensor) -> list[Tensor]:
        """All."""
        return list(_padded(vector, self.num_workers).chunk(self.num_workers))

    def to_slices(self, rows: Tensor) -> list[Tensor]:
        """Columns of the rows."""
        padded = _padded(rows, self.num_workers)
        self.bytes_sent += _others(padded[0], self.num_workers) // self.num_workers
        return [part.contiguous() for part in padded.chunk(self.num_workers, dim=1)]

    def from_slices(self, slices: list[Tensor], size: int) -> Tensor:
        """One after another."""
        self.bytes_sent += _others(slices[0], self.num_workers)
        return torch.cat(slices)[:size]


class ManyProcesses(HoldsGroup):
    """One worker on each rank of a process group."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.num_workers, self.bytes_sent = group, group.size(), 0
        self.local = [group.rank()]

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """One all-gather."""
        from torch.distributed import all_gather

        found = [torch.empty_like(parts[0]) for _ in range(self.num_workers)]
        all_gather(found, parts[0].contiguous(), group=self.group)
        self.bytes_sent += _others(parts[0], self.num_workers)
        return found

    def own_slices(self, vector: Tensor) -> list[Tensor]:
        """One."""
        return [_padded(vector, self.num_workers).chunk(self.num_workers)[self.local[0]]]

    def to_slices(self, rows: Tensor) -> list[Tensor]:
        """One all-to-all: no rank ever holds another's whole vector."""
        from torch.distributed import all_to_all_single

        padded = _padded(rows, self.num_workers)[0].contiguous()
        found = torch.empty_like(padded)
        all_to_all_single(found, padded, group=self.group)
        self.bytes_sent += _others(padded, self.num_workers) // self.num_workers
        return [found.view(self.num_workers, -1)]

    def from_slices(self, slices: list[Tensor], size: int) -> Tensor:
        """One all-gather."""
        return torch.cat(self.gather(slices))[:size]


def find_workers(num_workers: int | None, group: ProcessGroup | None) -> Workers:
    """The workers that two arguments ask for.

    Raises:
        ValueError: for fewer than two workers, and for a number that is not the group's size.
    """
    from torch import distributed

    if group is None and num_workers is None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "num_workers=None: give num_workers=m to simulate m workers on this process, or a process_group (after "
                "torch.distributed.init_process_group)."
            )
        group = distributed.group.WORLD
    size = num_workers if group is None else group.size()
    if size is None or size < 2:
        name = "num_workers" if group is None else "process_group: its size"
        raise ValueError(f"{name}={size} must be at least 2: the curvature comes from differences between workers.")
    if num_workers not in (None, size):
        raise ValueError(
            f"num_workers={num_workers} is not the size {size} of process_group: leave num_workers away, or start as "
            "many processes."
        )
    return OneProcess(size) if group is None else ManyProcesses(group)


def _padded(rows: Tensor, num_workers: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % num_workers))


def _others(part: Tensor, num_workers: int) -> int:
    return part.numel() * part.element_size() * (num_workers - 1)
