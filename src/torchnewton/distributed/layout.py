"""Vectors of which every rank has a part: made whole, summed, and cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchnewton.distributed.processes import Processes
from torchnewton.distributed.reduced import weighted
from torchnewton.vectors import Vector, is_distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

MESH = "torchnewton.shard"  # the name of the only dimension of the meshes that `shard` makes
_MESSAGE = 2**20  # numbers in a message, at least those of one tensor


def is_shard(x: Tensor) -> bool:
    """Whether x lies where `shard` puts parameters."""
    return is_distributed(x) and x.device_mesh.mesh_dim_names == (MESH,)  # type: ignore[attr-defined]


def as_dtensor(x: Tensor) -> DTensor:
    """x, which is known to be one."""
    from torch.distributed.tensor import DTensor

    assert isinstance(x, DTensor)  # for mypy
    return x


def rows_of(length: int, rank: int, size: int) -> slice:
    """The rows of `length` that lie on a rank: ⌈length / size⌉ on the first ones, as `torch.chunk` cuts."""
    most = -(-length // size)
    return slice(min(rank * most, length), min((rank + 1) * most, length))


class Layout:
    """Where vectors like `params` lie: cut in the first dimension where a parameter is, else on every rank.

    Tensors that are cut go several in one message, of `_MESSAGE` numbers or one tensor; the parts of the ranks are
    filled up to one length.

    Cost: P numbers received in `gathered`, P sent in `summed`, P the number of entries. Memory: the whole vector, and
    a message.
    """

    def __init__(self, params: Sequence[Tensor], processes: Processes) -> None:
        self.params, self.processes = list(params), processes
        self.is_cut = [is_shard(p) and as_dtensor(p).placements[0].is_shard() for p in params]

    def gathered(self, v: Sequence[Tensor]) -> Vector:
        """The whole of a vector, plain on every rank; new memory for what is cut or was a DTensor."""
        whole: Vector = [as_dtensor(x).to_local().clone() if is_distributed(x) else x for x in v]
        for i, x in self._received(v):
            whole[i] = x
        return whole

    def gather_into(self, whole: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        """Write the whole of a vector over another one."""
        for x, new, cut in zip(whole, v, self.is_cut, strict=True):
            if is_distributed(new) and not cut:
                x.copy_(as_dtensor(new).to_local())
        for i, new in self._received(v):
            whole[i].copy_(new)

    def _received(self, v: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """What is cut, whole, with its position."""
        for chosen in self._messages():
            mine = [as_dtensor(v[i]).to_local().reshape(-1) for i in chosen]
            parts = self.processes.parts(torch.cat(mine) if len(mine) > 1 else mine[0], max(self._sizes(chosen)))
            by_rank = [self._split(part, chosen, r) for r, part in enumerate(parts)]
            for position, i in enumerate(chosen):
                yield i, torch.cat([pieces[position] for pieces in by_rank]).view(self.params[i].shape)

    def summed(self, whole: Vector, weight: float) -> Vector:
        """weight · whole vector, summed over the ranks and laid like the parameters: each rank receives its part.

        The list is taken over: its tensors are let go as they are sent.
        """
        total: list[Tensor | None] = [None] * len(whole)
        for chosen in self._messages():
            mine = self.processes.part_of_sum(self._packed(whole, chosen, weight))
            for i, piece in zip(chosen, self._split(mine, chosen, self.processes.rank), strict=True):
                total[i] = self._laid(piece.clone() if len(chosen) > 1 else piece, i)
                whole[i] = mine
        others = [i for i, cut in enumerate(self.is_cut) if not cut]
        for i, found in zip(others, self.processes.sum(weighted([whole[i] for i in others], weight)), strict=True):
            total[i] = self._laid(found, i)
        return [x for x in total if x is not None]

    def cut(self, whole: Sequence[Tensor]) -> Vector:
        """A vector that every rank has, laid like the parameters; no message."""
        return [
            self._laid(x[self._rows(i, self.processes.rank)].clone() if cut else x, i)
            for i, (x, cut) in enumerate(zip(whole, self.is_cut, strict=True))
        ]

    def _rows(self, i: int, rank: int) -> slice:
        return rows_of(self.params[i].shape[0], rank, self.processes.size)

    def _messages(self) -> Iterator[list[int]]:
        """The positions of the tensors in each message, one dtype in each."""
        chosen: list[int] = []
        length = 0
        for i in (i for i, cut in enumerate(self.is_cut) if cut):
            p = self.params[i]
            if chosen and (length + p.numel() > _MESSAGE or p.dtype is not self.params[chosen[0]].dtype):
                yield chosen
                chosen, length = [], 0
            chosen.append(i)
            length += p.numel()
        if chosen:
            yield chosen

    def _lengths(self, chosen: Sequence[int], rank: int) -> list[int]:
        """How many entries of each tensor lie on a rank."""
        found = []
        for i in chosen:
            shape, rows = self.params[i].shape, self._rows(i, rank)
            found.append((rows.stop - rows.start) * shape[1:].numel())
        return found

    def _sizes(self, chosen: Sequence[int]) -> list[int]:
        """The entries of a message by rank."""
        return [sum(self._lengths(chosen, r)) for r in range(self.processes.size)]

    def _split(self, part: Tensor, chosen: Sequence[int], rank: int) -> list[Tensor]:
        """A rank's part of a message, without what fills it up, by tensor."""
        lengths = self._lengths(chosen, rank)
        return list(part[: sum(lengths)].split(lengths))

    def _packed(self, whole: Sequence[Tensor], chosen: Sequence[int], weight: float) -> Tensor:
        """What each rank receives of a message, a row for each, filled up; 0 for the weight 0, whatever is there."""
        size = self.processes.size
        rows = whole[chosen[0]].new_zeros(size, max(self._sizes(chosen)))
        for rank in range(size if weight else 0):
            pieces = [whole[i][self._rows(i, rank)].reshape(-1) for i in chosen]
            for place, piece in zip(self._split(rows[rank], chosen, rank), pieces, strict=True):
                torch.mul(piece, weight, out=place)
        return rows

    def _laid(self, local: Tensor, i: int) -> Tensor:
        p = self.params[i]
        if not is_distributed(p):
            return local
        if self.is_cut[i]:
            rows = self._rows(i, self.processes.rank)
            local = local.reshape(rows.stop - rows.start, *p.shape[1:])
        return laid(local, as_dtensor(p).device_mesh, p.shape)


def laid(local: Tensor, mesh: DeviceMesh, shape: torch.Size) -> DTensor:
    """The DTensor of this shape of which `local` lies here: all of it where there is no first dimension to cut."""
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    place: Placement = Shard(0) if shape else Replicate()
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [place], run_check=False, shape=shape, stride=stride)
