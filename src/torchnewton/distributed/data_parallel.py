"""Every rank has its own samples: the objective, its derivatives and its curvature are sums over the ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import LinearOperator, Rows, Shared, noise_parts, noise_scale
from torchnewton.distributed.processes import Processes, Table, fingerprint
from torchnewton.distributed.reduced import Reduced, weighted
from torchnewton.distributed.reductions import Kind, agreed, kind_and_samples
from torchnewton.record import StreamedTape, Tape, moved
from torchnewton.solvers import Operator, SolveResult, Status
from torchnewton.vectors import Vector

Result = TypeVar("Result")
Recorded = TypeVar("Recorded", bound=Tape | StreamedTape)


class DataParallel:
    """f = Σ wᵣfᵣ over the ranks r of a process group, fᵣ what the closure returns on rank r.

    wᵣ = nᵣ / Σ nᵣ for closures that return means over nᵣ samples, 1 for closures that return sums. By default nᵣ is
    what the recorded loss calls divide by (for `cross_entropy` the samples that are not ignored, by their weights),
    else the length of the outputs; what is a sum is seen from the weights of the recorded losses in f, so that
    `reduction="sum"` and a division by n is a mean: see `kind_and_samples`. A rank with nᵣ = 0 counts nothing.
    Of batches by `over`, nᵣ is the sum of their weights, by default their samples, and no argument changes it.

    Args:
        group: a process group; by default all ranks.
        num_samples: nᵣ, or a function of the tape that gives it, where the default does not fit. A number is that of
            the closure, not of the one for `curvature`.
        summed: whether the closure returns sums, where the default does not fit.
        timeout: seconds after which an exchange fails with an error that names the missing ranks.

    Errors: `ValueError` for arguments, for a loss without a split where `num_samples` is not given, and for closures
    that add means and sums, or return sums on some ranks alone; `RankError` where another rank fails or does not
    answer.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        num_samples: float | Callable[[Tape], float] | None = None,
        summed: bool | None = None,
        timeout: float = 600.0,
    ) -> None:
        if not dist.is_initialized():
            raise ValueError(
                'process_group: torch.distributed is not initialized; call init_process_group("gloo") (or "nccl") '
                "first, and launch the program with torchrun."
            )
        self.processes = Processes(dist.group.WORLD if group is None else group, timeout)  # type: ignore[arg-type]
        self.num_samples = num_samples
        self.summed = summed

    @classmethod
    def of(cls, given: DataParallel | dist.ProcessGroup | None) -> DataParallel | None:
        """From what `Newton` takes as `process_group`."""
        return given if given is None or isinstance(given, DataParallel) else cls(given)

    def check_same(self, params: Sequence[Tensor]) -> None:
        """Raise `ValueError` unless all ranks hold the same parameters, by their fingerprint."""
        rows = self.processes.table(fingerprint(params))
        other = [r for r, row in enumerate(rows) if row != rows[0]]
        if other:
            raise ValueError(
                f"process_group: the parameters of rank {other[0]} are not those of rank 0: build the model with the "
                "same seed, load the same checkpoint, or wrap it in DistributedDataParallel, which copies those of "
                "rank 0."
            )

    def for_curvature(self) -> DataParallel:
        """The same for a closure with other samples."""
        if self.num_samples is None or callable(self.num_samples):
            return self
        found = copy.copy(self)
        found.num_samples = None
        return found

    def weigh(self, tape: Tape | StreamedTape) -> tuple[float, Kind]:
        """nᵣ of this rank's tape, and what its loss is."""
        if isinstance(tape, StreamedTape):
            return tape.total_weight, Kind.MEAN
        kind, n = kind_and_samples(tape)
        if self.num_samples is not None:
            n = float(self.num_samples(tape) if callable(self.num_samples) else self.num_samples)
        elif not tape.pieces:
            raise ValueError(
                "DataParallel: the loss has no split that tells its number of samples; give "
                "process_group=tn.DataParallel(num_samples=…), for a curvature closure a function of the tape, or mark "
                "the network's outputs with tn.outputs(z)."
            )
        if not 0 <= n < math.inf:
            raise ValueError(f"DataParallel: num_samples={n} must be a number that is not negative.")
        return n, kind if self.summed is None else Kind(self.summed)


class Alone:
    """The share of the only process: all of the objective."""

    parallel: DataParallel | None = None

    def total(self, run: Callable[[], float]) -> float:
        """f."""
        return run()

    def everywhere(self, run: Callable[[], Result]) -> Result:
        """Run something."""
        return run()

    def reduced(self, v: Vector) -> Vector:
        """v."""
        return v

    def gradient(self, tape: Tape | StreamedTape) -> Vector:
        """∇f."""
        return self.reduced(tape.gradient)

    def operator(self, A: LinearOperator) -> LinearOperator:
        """A."""
        return A

    def preconditioner(self, M: Operator | None) -> Operator | None:
        """M."""
        return M

    @contextmanager
    def moved(self, params: Sequence[Tensor], direction: Sequence[Tensor], length: float) -> Iterator[None]:
        """See `torchnewton.record.moved`."""
        with moved(params, direction, length):
            yield

    @property
    def statistics(self) -> Shared | None:
        """How statistics become those of all samples: they are."""
        return None

    def noise_scale(self, tape: Tape, generator: torch.Generator) -> float:
        """See `torchnewton.curvature.noise_scale`."""
        return noise_scale(tape, generator)

    def largest(self, number: float) -> float:
        """The number."""
        return number

    def agreed(self, result: SolveResult, b: Sequence[Tensor]) -> SolveResult:
        """The result."""
        return result

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Inner products are what they are."""
        yield

    def check_same(self, params: Sequence[Tensor]) -> None:
        """There is nobody to differ from."""

    def spent(self) -> tuple[int, int]:
        """No bytes, no messages."""
        return 0, 0


class Share(Alone):
    """One rank's part of the objective: what is to be summed, and what all must agree on."""

    def __init__(self, parallel: DataParallel, table: Table) -> None:
        self.parallel: DataParallel = parallel
        self.processes = parallel.processes
        counts, kinds, streamed = ([row[column] for row in table] for column in range(3))
        if len(set(streamed)) > 1:
            raise ValueError(
                "process_group: some ranks give several batches by tn.over, others a closure or a single batch; cut a "
                "rank's samples into two batches or more."
            )
        self.summed = _is_sum([Kind(int(kind)) for kind, n in zip(kinds, counts, strict=True) if n or not any(counts)])
        total = sum(counts)
        if not self.summed and not total > 0:
            raise ValueError("DataParallel: no rank has a sample (num_samples is 0 everywhere).")
        self.counts = counts
        self.weights = [1.0 if self.summed else n / total for n in counts]
        self.weight = self.weights[self.processes.rank]
        self.fraction = counts[self.processes.rank] / total if total > 0 else 0.0

    @classmethod
    def recorded(cls, parallel: DataParallel, run: Callable[[], Recorded]) -> tuple[Recorded, Share]:
        """Record on every rank."""

        def numbers(tape: Recorded) -> list[float]:
            n, kind = parallel.weigh(tape)
            return [n, float(kind), float(isinstance(tape, StreamedTape))]

        made: list[Recorded] = []

        def kept() -> Recorded:
            made.append(run())
            return made[0]

        try:
            tape, table = parallel.processes.together(kept, numbers)
            return tape, cls(parallel, table)
        except BaseException:
            for tape in made:
                tape.buffers.restore()
            raise

    def total(self, run: Callable[[], float]) -> float:
        """Σ wᵣfᵣ of a loss that every rank computes."""
        _, table = self.processes.together(run, lambda value: [value])
        return math.fsum(w * row[0] for w, row in zip(self.weights, table, strict=True) if w)

    def everywhere(self, run: Callable[[], Result]) -> Result:
        """Run something; an exception on one rank is one on all."""
        return self.processes.together(run)[0]

    def reduced(self, v: Vector) -> Vector:
        """Σ wᵣvᵣ."""
        return self.processes.sum(weighted(v, self.weight))

    def operator(self, A: LinearOperator) -> LinearOperator:
        """Σ wᵣAᵣ."""
        return Reduced(A, self.processes, self.weight, self.fraction)

    @property
    def statistics(self) -> Shared | None:
        """How statistics become those of the samples of all ranks."""
        return SharedByRanks(self)

    def noise_scale(self, tape: Tape, generator: torch.Generator) -> float:
        """That of all samples: Σ wᵣ²sᵣ / Σ wᵣtᵣ with the parts sᵣ, tᵣ of rank r."""
        squares, trace = noise_parts(tape, generator, self.statistics)
        if not self.fraction:
            squares = trace = 0.0
        rows = self.processes.table([self.weight**2 * squares, self.weight * trace])
        squares, trace = (sum(column) for column in zip(*rows, strict=True))
        return squares / trace if trace > 0 else 0.0

    def largest(self, number: float) -> float:
        """The largest of all ranks' numbers."""
        return max(row[0] for row in self.processes.table([number]))

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Inner products inside are those of rank 0."""
        with vectors.agreeing(self.processes.agreed):
            yield

    def check_same(self, params: Sequence[Tensor]) -> None:
        """See `DataParallel.check_same`."""
        self.parallel.check_same(params)

    def spent(self) -> tuple[int, int]:
        """See `Processes.spent`."""
        return self.processes.spent()

    def of_first(self, v: Vector) -> Vector:
        """What rank 0 has found."""
        return self.processes.of_first(v)

    def agreed(self, result: SolveResult, b: Sequence[Tensor]) -> SolveResult:
        """What rank 0 has found for Ax = b: where processors differ, factorizations do so in rounding, or in status."""
        kinds = list(Status)
        curved = result.curved(-vectors.dot(b, result.solution))
        numbers = [kinds.index(result.status), curved, result.residual_norm, bool(result.reuse), bool(result.shifted)]
        agreed = self.processes.numbers_of_first([*numbers, *result.coefficients])
        status, curved, size, can_reuse, can_shift = agreed[:5]
        reuse, shifted = result.reuse or list, result.shifted or (lambda more: result)
        return replace(
            result,
            solution=self.of_first(result.solution),
            residual=None,
            residual_norm=size,
            status=kinds[int(status)],
            reuse=(lambda rhs: self.of_first(reuse(rhs))) if can_reuse else None,
            shifted=(lambda more: self.agreed(shifted(more), b)) if can_shift else None,
            curvature=curved,
            coefficients=tuple(agreed[5:]),
        )


class SharedByRanks(Shared):
    """Every rank has some of the samples."""

    def __init__(self, share: Share) -> None:
        self.share, self.processes, self.rank = share, share.processes, share.processes.rank
        self.has_samples = share.fraction > 0

    def told(self, numbers: Sequence[float]) -> list[list[float]]:
        """See `Shared.told`."""
        return self.processes.rows(numbers)

    def factors(self, left: Vector, right: Vector, holders: Sequence[Sequence[int]]) -> tuple[Vector, Vector]:
        """Σ wᵣLᵣ and the mean of the Rᵣ over the samples, of the ranks that have them, in one message."""
        shares = [self._share_among(ranks) for ranks in holders]
        lefts = [x for L, part in zip(left, shares, strict=True) for x in weighted([L], self.share.weight * (part > 0))]
        rights = [x for R, part in zip(right, shares, strict=True) for x in weighted([R], part)]
        found = self.processes.sum([*lefts, *rights])
        return found[: len(left)], found[len(left) :]

    def _share_among(self, ranks: Sequence[int]) -> float:
        """How many of the samples of some ranks are this one's."""
        counts = self.share.counts
        return counts[self.rank] / sum(counts[r] for r in ranks) if self.rank in ranks else 0.0

    def rows(self, counts: Sequence[int]) -> list[Rows]:
        """See `Shared.rows`: one message."""
        columns = zip(*self.processes.table(counts), strict=True)
        before = self.processes.rank
        return [Rows(int(sum(column[:before])), int(sum(column))) for column in columns]

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """See `Shared.sums`: one message."""
        table = self.processes.table(numbers if self.share.fraction else [0.0] * len(numbers))
        return [math.fsum(column) for column in zip(*table, strict=True)]


def _is_sum(kinds: Sequence[Kind]) -> bool:
    """Whether the closures of the ranks that have samples return sums."""
    if {Kind.MEAN, Kind.SUM} <= set(kinds):
        raise ValueError("DataParallel: some ranks return sums, some means; say summed=True or False.")
    if Kind.UNKNOWN in kinds:
        raise ValueError(
            "DataParallel: a closure adds means and sums over its samples, or weighs them in a way that does not tell "
            "which of the two it returns; say process_group=tn.DataParallel(summed=…), and for means num_samples=…"
        )
    return agreed(kinds) in (Kind.SUM, Kind.PERHAPS_SUM)
