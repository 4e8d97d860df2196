"""Every rank solves for its own block of the parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import LinearOperator
from torchnewton.distributed.axes import Axes
from torchnewton.distributed.blocks import RangeBlocks
from torchnewton.distributed.cut_blocks import CutBlocks
from torchnewton.distributed.processes import Processes
from torchnewton.distributed.reduced import Reduced
from torchnewton.solvers import CG, Operator, Plane, SolveResult, Status, StoppingRule
from torchnewton.vectors import dot


@dataclass(frozen=True)
class Quorum:
    """A rank's solve also ends once `share` of all ranks are done with theirs, after `min_iterations` of its own.

    A rank is done when its solver has met its tolerance or its limit. Every iteration after the first
    `min_iterations` asks once, 8 bytes; nobody waits for an answer of another rank. From step to step the ranks change
    their blocks in turn, so that what a slow rank leaves unsolved is another block each time.
    """

    share: float = 0.5
    min_iterations: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Quorum: share={self.share} must be more than 0 and at most 1.")
        if self.min_iterations < 1:
            raise ValueError(f"Quorum: min_iterations={self.min_iterations} must be at least 1.")


@dataclass(frozen=True)
class _AtQuorum:
    """The stopping rule of one solve on one rank."""

    quorum: Quorum
    processes: Processes
    topic: str
    other: StoppingRule | None

    def check(self, model: Sequence[float], residual: Sequence[Tensor]) -> Status | None:
        """See `StoppingRule.check`."""
        status = self.other.check(model, residual) if self.other is not None else None
        if status is not None or len(model) - 1 < self.quorum.min_iterations:
            return status
        enough = self.processes.hands(self.topic) >= self.quorum.share * self.processes.size
        return Status.QUORUM if enough else None


@dataclass(frozen=True)
class Diagonalized:
    """Solves Ax = b without the blocks of A that couple the parameters of different ranks.

        Aₚₚ dₚ = bₚ    on rank p, Aₚₚ from the samples of rank p alone,    x = d, or β₁d + β₂x₀ with `combine`

    `solver` solves for dₚ and exchanges nothing; then one message joins the dₚ. With `combine` (β₁, β₂) minimizes
    ½xᵀAx − bᵀx with the whole A, and x₀ is the optimizer's previous step; without it x = d. Without several processes
    there is one block: x is what `solver` finds.

    Rank p has the p-th of equal parts of all parameters in their order, see `Partition`, with a quorum the one after it
    in the next step; its block is that of the samples it has seen, a subsampled curvature. For the exact block give all
    ranks the same `curvature` closure.

    On a model that `partition` has cut, rank p solves for the blocks of the layers that it holds, by explicit factors
    and with all samples: see `CutBlock`.

    Cost: the products of the slowest rank, then half a product for each direction; messages: P / ranks numbers for d,
    three for the states of the ranks, k² for the combination of k directions. Memory: `solver`'s vectors by 1 / ranks.
    Source: Wang et al., "Distributed Newton Methods for Deep Neural Networks", arXiv 1802.00130: diagonalization, the
    end of the solve before all are done (abstract), two directions (recalled). Deviations: the model is on every rank,
    the partition is by ranges of entries, and a product costs what it costs for all parameters, unless `partition` has
    cut the model.
    """

    solver: CG
    combine: bool = True
    quorum: Quorum | None = None

    @property
    def uses_previous_step(self) -> bool:
        """x₀ is the previous step."""
        return self.combine

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`; a preconditioner of the whole is not used."""
        blocks = self._blocks(A, b) if isinstance(A, LinearOperator) else None
        if not isinstance(A, LinearOperator) or blocks is None:
            found = self.solver.solve(A, b)
        else:
            found = self._in_blocks(A, b, blocks)
        if not self.combine or found.status is Status.NOT_FINITE:
            return found
        best = Plane().over(A, b, [found.solution] if x0 is None else [found.solution, list(x0)])
        return replace(
            found,
            solution=best.solution,
            residual=None,
            curvature=2 * (dot(b, best.solution) - best.predicted_reduction),
            num_products=found.num_products + best.num_products,
        )

    def _blocks(self, A: LinearOperator, b: Sequence[Tensor]) -> Blocks | None:
        """Those that the ranks hold, or ranges of a model that is on all of them; None for one process."""
        share = getattr(A.domain[0], "share", None)
        if isinstance(share, Axes):
            return CutBlocks(A.domain, share)
        processes = _processes_of(A)
        if processes is None:
            return None
        if any(map(vectors.is_distributed, b)):
            raise ValueError(
                "Diagonalized: parameters that `shard` has cut have no blocks yet; leave shard out, or take NewtonCG."
            )
        return RangeBlocks(b, processes, 0 if self.quorum is None else processes.next_turn())

    def _in_blocks(self, A: LinearOperator, b: Sequence[Tensor], blocks: Blocks) -> SolveResult:
        """The joined direction, not finite where that of a rank is not."""
        processes, block = blocks.processes, blocks.block(A)
        solver = self._solver(processes)
        before = blocks.spent
        with vectors.agreeing(None):
            found = solver.solve(block, blocks.cut(b))
        exchanged = blocks.spent - before
        finite = found.status is not Status.NOT_FINITE
        rows = processes.table([finite, found.num_iterations, found.residual_norm**2 if finite else 0.0])
        d = blocks.joined(found.solution, b)
        curvature, products = None, 0.0
        if not self.combine:
            form, products = A.quadratic_form([d])
            curvature = float(form[0, 0])
        iterations = "/".join(f"{row[1]:.0f}" for row in rows)
        return SolveResult(
            d,
            None,
            math.sqrt(math.fsum(row[2] for row in rows)),
            found.status if all(row[0] for row in rows) else Status.NOT_FINITE,
            int(max(row[1] for row in rows)),
            found.num_products + products,
            method=f"{found.method} in {processes.size} blocks, {iterations} iterations, {exchanged} bytes exchanged",
            curvature=curvature,
        )

    def _solver(self, processes: Processes) -> CG | _Raising:
        if self.quorum is None:
            return self.solver
        (now,) = processes.numbers_of_first([time.time_ns() % 2**52])  # a name of this solve that all ranks know
        topic = f"quorum/{now:.0f}"
        stop = _AtQuorum(self.quorum, processes, topic, self.solver.stop)
        return _Raising(replace(self.solver, stop=stop), processes, topic)


@dataclass(frozen=True)
class _Raising:
    """A solver that tells the others when it is done."""

    solver: CG
    processes: Processes
    topic: str

    def solve(self, A: Operator, b: Sequence[Tensor]) -> SolveResult:
        """See `Solver.solve`."""
        found = self.solver.solve(A, b)
        self.processes.raise_hand(self.topic)
        return found


class Blocks(Protocol):
    """How vectors and operators are cut over the ranks."""

    processes: Processes

    @property
    def spent(self) -> int:
        """Bytes exchanged so far."""
        ...

    def block(self, A: LinearOperator, /) -> LinearOperator:
        """The diagonal block of this rank."""
        ...

    def cut(self, v: Sequence[Tensor], /) -> vectors.Vector:
        """This rank's part of a vector."""
        ...

    def joined(self, d: Sequence[Tensor], like: Sequence[Tensor], /) -> vectors.Vector:
        """The vector of all ranks' parts."""
        ...


def _processes_of(A: Operator) -> Processes | None:
    """The processes that share the samples of a shifted or summed operator."""
    if isinstance(A, Reduced):
        return A.processes
    parts = (_processes_of(part) for part in getattr(A, "parts", ()))
    return next((found for found in parts if found is not None), None)
