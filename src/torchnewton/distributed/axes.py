"""Exchanges along the two axes of a mesh, and their derivatives of any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchnewton import vectors
from torchnewton.distributed.data_parallel import Alone
from torchnewton.distributed.processes import Processes


class Ranks:
    """Sums and maxima over some processes; nothing is exchanged where there is only one."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.rank, self.size = processes.rank, processes.size

    def sum(self, x: Tensor) -> Tensor:
        """Σ of everyone's x: one message."""
        return x if self.size == 1 else self.processes.sum([x])[0]

    def largest(self, number: Tensor) -> Tensor:
        """The largest of everyone's numbers: one message."""
        if self.size == 1:
            return number
        return number.new_tensor(max(row[0] for row in self.processes.table([float(number)])))


class Axis(Ranks):
    """The ranks of a mesh that differ in one coordinate, over which n entries are cut in parts of ⌈n / size⌉.

    Lengths are those of `torch.distributed.tensor.Shard`: the last parts may be shorter, or empty.
    """

    def __init__(self, processes: Processes, dim: int) -> None:
        super().__init__(processes)
        self.dim = dim

    def sizes(self, n: int) -> list[int]:
        """The lengths of all parts."""
        width = -(-n // self.size)
        return [min(width, max(n - rank * width, 0)) for rank in range(self.size)]

    def part(self, n: int) -> slice:
        """This rank's part."""
        start = sum(self.sizes(n)[: self.rank])
        return slice(start, start + self.sizes(n)[self.rank])

    def joined(self, x: Tensor, n: int) -> Tensor:
        """Everyone's parts of the last dimension, of n entries: one message."""
        if self.size == 1:
            return x
        rows = x.shape[:-1]
        sizes = [rows.numel() * size for size in self.sizes(n)]
        parts = self.processes.joined(x.reshape(-1), sizes).split(sizes)
        return torch.cat([part.view(*rows, size) for part, size in zip(parts, self.sizes(n), strict=True)], dim=-1)


class Axes(Alone):
    """The two axes of a mesh over which a model is cut; every rank has the whole objective.

    It takes the place of the share of a process that is alone: inner products of parts are sums over both axes, and
    what the layers and the inner products exchange is counted.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float = 600.0) -> None:
        self.mesh = mesh
        first, second = (Axis(Processes(mesh.get_group(dim), timeout), dim) for dim in range(2))
        self.axes = first, second
        everyone = Processes(dist.group.WORLD, timeout)  # type: ignore[arg-type]
        self.ranks = Ranks(everyone) if everyone.size == mesh.size() else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Axes:
        """A copied model exchanges over the same processes."""
        return self

    def sum(self, number: Tensor) -> Tensor:
        """Σ over all ranks of the mesh: one message where these are all that exist, else one for each axis."""
        if self.ranks is not None:
            return self.ranks.sum(number)
        return self.axes[1].sum(self.axes[0].sum(number))

    def max(self, number: Tensor) -> Tensor:
        """The largest over all ranks of the mesh."""
        if self.ranks is not None:
            return self.ranks.largest(number)
        return self.axes[1].largest(self.axes[0].largest(number))

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Inner products of DTensors inside go over these axes."""
        with vectors.exchanging(self):
            yield

    @property
    def bytes(self) -> int:
        """Those since `spent` was asked last."""
        return sum(group.processes.bytes for group in self._groups)

    def spent(self) -> tuple[int, int]:
        """Bytes and messages since the last call."""
        found = [group.processes.spent() for group in self._groups]
        return sum(num_bytes for num_bytes, _ in found), sum(messages for _, messages in found)

    @property
    def _groups(self) -> list[Ranks]:
        return [*self.axes, *([] if self.ranks is None else [self.ranks])]


@dataclass(frozen=True, eq=False)
class Call:
    """A layer's call on this rank: its parameters, as the model has them, and this rank's part of its input."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor


class Sum(torch.autograd.Function):
    """y = Σᵢ xᵢ over an axis: xᵢ differ, y is everywhere the same, and so is its cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        """See the class."""
        ctx.axis = axis
        return axis.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return spread(grads[0], ctx.axis), None


class Noted(torch.autograd.Function):
    """y, whose node in the graph keeps the call that has made it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, call: Call) -> Tensor:
        """See the class."""
        ctx.call = call
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """As it is."""
        return grads[0], None


class Spread(torch.autograd.Function):
    """xᵢ = y on every rank of an axis, where each goes on with it in its own way: the transpose of `Sum`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, axis: Axis) -> Tensor:
        """See the class."""
        ctx.axis = axis
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return summed(grads[0], ctx.axis), None


class Join(torch.autograd.Function):
    """z = (x₀, x₁, …) over an axis, everywhere the same, and so is its cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, n: int) -> Tensor:
        """See the class."""
        ctx.axis, ctx.n = axis, n
        return axis.joined(x, n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The transpose."""
        return cut(grads[0], ctx.axis), None, None


class Cut(torch.autograd.Function):
    """xᵢ, the part of z that belongs to this rank: the transpose of `Join`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, axis: Axis) -> Tensor:
        """See the class."""
        ctx.axis, ctx.n = axis, z.shape[-1]
        return z[..., axis.part(z.shape[-1])].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The transpose."""
        return joined(grads[0], ctx.axis, ctx.n), None


summed: Callable[..., Tensor] = Sum.apply
noted: Callable[..., Tensor] = Noted.apply
spread: Callable[..., Tensor] = Spread.apply
joined: Callable[..., Tensor] = Join.apply
cut: Callable[..., Tensor] = Cut.apply
