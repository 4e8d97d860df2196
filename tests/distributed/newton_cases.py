"""What the ranks do for `test_distributed_newton`."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from data_parallel_cases import closure_of, flat, make_batch, make_model, part, train

import torchnewton as tn
from torchnewton.curvature import GaussNewton
from torchnewton.distributed import Partition

STEPS = 5


class Counting:
    """A solver that keeps what was exchanged while it solved."""

    def __init__(self) -> None:
        self.solver, self.seen = tn.CG(rtol=1e-11, max_iterations=50), []
        self.processes: Any = None

    def solve(self, A, b):
        before = (self.processes.bytes, self.processes.messages)
        found = self.solver.solve(A, b)
        after = (self.processes.bytes, self.processes.messages)
        self.seen.append((after[0] - before[0], after[1] - before[1], found.num_iterations))
        return found


def on_blocks(rank: int, size: int) -> Any:
    """All ranks have the same samples in the curvature: exact blocks. Also: what is exchanged in the solve."""
    counting = Counting()
    parallel = tn.DataParallel()
    counting.processes = parallel.processes
    model = make_model()
    optimizer = tn.DistributedNewton(model.parameters(), combine=False, process_group=parallel)
    optimizer.solver = tn.Diagonalized(counting, combine=False)
    for step in range(STEPS):
        x, y = make_batch(step)
        optimizer.step(closure_of(model, *part((x, y), rank, size)), curvature=closure_of(model, x, y))
    report = optimizer.report
    return flat(model), counting.seen, (report.solver, report.bytes_communicated, report.messages)


def on_two_directions(rank: int, size: int) -> Any:
    return train(
        partial(tn.DistributedNewton, rtol=1e-12, process_group=dist.group.WORLD),
        lambda batch: part(batch, rank, size),
        steps=STEPS,
        subset=True,
    )


def on_one_block(rank: int, size: int) -> Any:
    """A group of one rank each: Newton-CG exactly, bit for bit."""
    alone = [dist.new_group([r]) for r in range(size)][rank]
    make = partial(tn.DistributedNewton, combine=False, process_group=alone)
    one = train(make, lambda batch: batch, steps=STEPS)
    other = train(partial(tn.NewtonCG, process_group=alone), lambda batch: batch, steps=STEPS)
    return torch.equal(one[0], other[0]), one[1] == other[1]


def on_partition(rank: int, size: int) -> Any:
    shapes = tuple(p.shape for p in make_model().parameters())
    return Partition(shapes, size).ranges(rank), Partition(shapes, size).sizes


def on_quorum(rank: int, size: int) -> Any:
    """Products on rank 1 take their time: it ends when two ranks are done, without a quorum it does not."""
    original, found = GaussNewton.apply, []

    def slow(self, v):
        time.sleep(0.03 * (rank == 1))
        return original(self, v)

    for quorum in (None, tn.Quorum(share=0.5, min_iterations=3)):
        model = make_model()
        make = partial(tn.DistributedNewton, rtol=0.0, max_iterations=20, quorum=quorum)
        optimizer = make(model.parameters(), process_group=dist.group.WORLD)
        closure = closure_of(model, *part(make_batch(), rank, size))
        GaussNewton.apply = slow
        optimizer.step(closure)
        GaussNewton.apply = original
        report = optimizer.report
        found.append((report.solver, report.accepted, report.bytes_communicated, flat(model)))
    return found


def on_not_finite_block(rank: int, size: int) -> Any:
    """The curvature of one rank's block is not a number: the step is rejected on all."""
    model = make_model()
    optimizer = tn.DistributedNewton(model.parameters(), process_group=dist.group.WORLD)
    closure = closure_of(model, *part(make_batch(), rank, size))
    before, original = flat(model), GaussNewton.apply
    if rank == 0:
        GaussNewton.apply = lambda self, v: [torch.full_like(x, math.nan) for x in v]
    optimizer.step(closure)
    GaussNewton.apply = original
    status = optimizer.report.status
    untouched = torch.equal(flat(model), before)
    optimizer.step(closure)
    return untouched, status, optimizer.report.accepted
