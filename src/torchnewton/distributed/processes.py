"""A group of processes: exchanges that are counted, end in time, and name the rank that is missing."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchnewton.record import UNDEFINED, RecordError
from torchnewton.vectors import Vector, flatten, unflatten

Result = TypeVar("Result")
Table = list[list[float]]

_POLL = 0.05  # seconds
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_MIX = -7046029254386353131  # 2⁶⁴ divided by the golden ratio, an odd number whose bits look random
_WIDTH = 3  # the numbers that the ranks tell each other beside whether they have failed


class RankError(RuntimeError):
    """Another rank has failed or does not answer; the message names it."""


class ClosureError(RankError):
    """The closure of another rank has failed."""


class UndefinedError(ClosureError, ArithmeticError):
    """The same, where the loss is not defined there: one of `UNDEFINED`, as the other rank's own error is."""


class UnrecordableError(ClosureError, RecordError):
    """The same, where the other rank's error is a `RecordError`."""


_SORTS = (ClosureError, UndefinedError, UnrecordableError)


class HoldsGroup:
    """A part of an optimizer that holds a process group: copies share it, other processes cannot have it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HoldsGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimizer with a process group cannot be pickled, since the group belongs to this process: save its "
            "state_dict(), and load that into an optimizer made with process_group= where it is to go on."
        )


def fingerprint(params: Sequence[Tensor]) -> list[float]:
    """Two numbers that tell parameters of other values, order or shapes apart, whatever adds them up."""
    sums = []
    for p in params:
        x = p.detach().contiguous().reshape(-1)
        bits = x.view(_INTEGERS[x.element_size()]).to(torch.int64)
        bits = (bits + torch.arange(len(bits), device=bits.device) * _MIX) * _MIX  # modulo 2⁶⁴
        sums += [int((bits ^ (bits >> 29)).sum()), *p.shape]
    return [float(len(params)), float(zlib.crc32(struct.pack(f"{len(sums)}q", *sums)))]


class Processes(HoldsGroup):
    """The ranks of a process group of `torch.distributed`, seen from one of them.

    Every method that exchanges is called by all ranks, in the same order. `bytes` counts what this rank has put into
    exchanges, `messages` their number. An exchange that takes longer than `timeout` seconds raises `RankError`, which
    names the ranks that did not come to it.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float = 600.0) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} must be a positive number of seconds.")
        self.group = group
        self.timeout = timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group: this process is no member of it; call step on its members only.")
        self._first = dist.get_global_rank(group, 0)
        self.bytes = self.messages = self._number = self._turn = 0

    def spent(self) -> tuple[int, int]:
        """Bytes and messages since the last call."""
        found = self.bytes, self.messages
        self.bytes = self.messages = 0
        return found

    def next_turn(self) -> int:
        """0, 1, 2, …: the same on all ranks, which ask equally often."""
        self._turn += 1
        return self._turn - 1

    def sum(self, x: Sequence[Tensor]) -> Vector:
        """Σ of everyone's x, the same on every rank bit by bit; one message for each dtype."""
        return self._packed(x, lambda flat: dist.all_reduce(flat, group=self.group, async_op=True))

    def of_first(self, x: Sequence[Tensor]) -> Vector:
        """What rank 0 has; the others give tensors of the same shapes."""
        return self._packed(x, lambda flat: dist.broadcast(flat, self._first, group=self.group, async_op=True))

    def table(self, numbers: Sequence[float]) -> Table:
        """Everyone's numbers, in float64, by rank."""
        row = torch.tensor(numbers, dtype=torch.float64, device=self._device())
        rows = [torch.empty_like(row) for _ in range(self.size)]
        self._exchange(row, lambda: dist.all_gather(rows, row, group=self.group, async_op=True))
        return [[float(v) for v in r] for r in torch.stack(rows).cpu()]

    def rows(self, numbers: Sequence[float]) -> Table:
        """Everyone's numbers, which may be more on some ranks than on others, by rank: one message, or two."""
        row = [float(n) for n in numbers]
        told = self.table([len(row), zlib.crc32(struct.pack(f"{len(row)}d", *row))])
        if all(other == told[0] for other in told):
            return [row] * self.size
        lengths = [int(length) for length, _ in told]
        found = self.table(row + [0.0] * (max(lengths) - len(row)))
        return [other[:length] for other, length in zip(found, lengths, strict=True)]

    def together(
        self, run: Callable[[], Result], numbers: Callable[[Result], list[float]] = lambda _: [], width: int = _WIDTH
    ) -> tuple[Result, Table]:
        """Run something that may fail on some ranks; everyone's numbers, at most `width`. For failures see `agree`."""
        try:
            found = run()
            row = numbers(found)
        except BaseException as error:
            self.tell_failure(error, width)
            raise
        return found, self.agree(None, [*row, *[0.0] * (width - len(row))])

    def tell_failure(self, failure: BaseException, width: int = _WIDTH) -> None:
        """Tell the others, who are at the end of `together`, that this rank has failed."""
        self.agree(failure, [0.0] * width)

    def agree(self, failure: BaseException | None, numbers: Sequence[float] = ()) -> Table:
        """Everyone's numbers; if a rank has failed, an exception on all, which whoever catches exceptions treats alike.

        It is that of the rank itself where all failures are of the same sort, `UNDEFINED`, `RecordError` or others, or
        where it is one of the others; else a `ClosureError` of the sort.
        """
        rows = self.table([_sort_of(failure), *numbers])
        sorts = [int(row[0]) for row in rows]
        met = {sort for sort in sorts if sort}
        if not met:
            return [row[1:] for row in rows]
        sort = met.pop() if len(met) == 1 else 1
        if failure is not None and _sort_of(failure) == sort:
            raise failure
        failed = sorts.index(sort) if sort in sorts else next(r for r, s in enumerate(sorts) if s)
        raise _SORTS[sort - 1](f"rank {failed} has failed in its closure; its own output tells why.") from failure

    def numbers_of_first(self, numbers: Sequence[float]) -> list[float]:
        """The numbers of rank 0, in float64."""
        (row,) = self.of_first([torch.tensor([float(v) for v in numbers], dtype=torch.float64, device=self._device())])
        return [float(v) for v in row.cpu()]

    def joined(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Everyone's flat x, one after the other; `sizes` are their lengths by rank."""
        return torch.cat([part[:size] for part, size in zip(self.parts(x, max(sizes)), sizes, strict=True)])

    def parts(self, x: Tensor, longest: int) -> list[Tensor]:
        """Everyone's flat x, each filled up to a length that all know."""
        mine = torch.cat([x, x.new_zeros(longest - len(x))]) if len(x) < longest else x
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._exchange(mine, lambda: dist.all_gather(found, mine, group=self.group, async_op=True))
        return found

    def part_of_sum(self, rows: Tensor) -> Tensor:
        """This rank's row of Σ `rows` over the ranks; a row for each rank."""
        mine = torch.empty_like(rows[self.rank])
        self._exchange(rows, lambda: dist.reduce_scatter(mine, list(rows), group=self.group, async_op=True))
        return mine

    def raise_hand(self, topic: str) -> None:
        """Tell the others, who may ask at any time, that this rank is done."""
        self._ask(topic, 1)

    def hands(self, topic: str) -> int:
        """How many ranks are done, as far as is known now; nobody waits."""
        return self._ask(topic, 0)

    def _ask(self, topic: str, amount: int) -> int:
        self.bytes += 8
        self.messages += 1
        return int(self.group.get_group_store().add(f"torchnewton/{topic}", amount))

    def agreed(self, number: Tensor) -> Tensor:
        """The number of rank 0, see `vectors.agreeing`."""
        (found,) = self.of_first([number])
        return found

    def _packed(self, x: Sequence[Tensor], launch: Callable[[Tensor], Any]) -> Vector:
        found: list[Tensor | None] = [None] * len(x)
        for dtype in dict.fromkeys(t.dtype for t in x):
            chosen = [i for i, t in enumerate(x) if t.dtype is dtype]
            like = [x[i] for i in chosen]
            flat = flatten(like) if len(like) > 1 else like[0].reshape(-1).clone()
            self._exchange(flat, lambda flat=flat: launch(flat))  # type: ignore[misc]
            for i, part in zip(chosen, unflatten(flat, like), strict=True):
                found[i] = part
        return [t for t in found if t is not None]

    def _exchange(self, payload: Tensor, launch: Callable[[], Any]) -> None:
        self.bytes += payload.numel() * payload.element_size()
        self.messages += 1
        self._number += 1
        start = time.monotonic()
        try:
            launch().wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise RankError(self._who(time.monotonic() - start)) from error

    def _device(self) -> torch.device:
        cuda = "nccl" in dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def _who(self, waited: float) -> str:
        """Name those who do not say in the group's store, within some seconds, that they have met the error, too."""
        start = f"rank {self.rank}: exchange number {self._number} failed after {waited:.1f} s"
        try:
            missing = self._missing()
        except RuntimeError as error:
            return f"{start}, and the store of the process group does not answer either: {error}"
        if not missing:
            return f"{start}, though every rank has come to it: is the connection between them broken?"
        names = ", ".join(f"rank {r}" for r in missing)
        return (
            f"{start}: {names} did not come to it. It hangs, has ended, or takes another course; its own output tells "
            f"more. If it is only slow, raise timeout={self.timeout:g} (seconds)."
        )

    def _missing(self) -> list[int]:
        store = self.group.get_group_store()
        key = f"torchnewton/failed/{self._number}"
        store.set(f"{key}/{self.rank}", "here")
        missing = [r for r in range(self.size) if r != self.rank]
        end = time.monotonic() + min(self.timeout, 5.0)
        while missing and time.monotonic() < end:
            missing = [r for r in missing if not store.check([f"{key}/{r}"])]
            time.sleep(_POLL)
        return missing


def _sort_of(failure: BaseException | None) -> int:
    """0 for none, else 1 + the place in `_SORTS` of what stands for it on other ranks."""
    if failure is None:
        return 0
    return 2 if isinstance(failure, UNDEFINED) else 3 if isinstance(failure, RecordError) else 1
