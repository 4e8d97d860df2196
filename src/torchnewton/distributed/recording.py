"""`record_share`: the tape of a rank, and its part in the objective of all; `average_share` for many batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import Average, LinearOperator
from torchnewton.distributed.data_parallel import Alone, DataParallel, Recorded, Share
from torchnewton.distributed.layout import as_dtensor, is_shard
from torchnewton.distributed.processes import Processes
from torchnewton.distributed.shard import present
from torchnewton.distributed.sharded import ShardedShare
from torchnewton.record import Closure, Objective, StreamedTape, Tape, kept_gradients, record, tape_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_IN_PARTS = (
    "process_group: the batches of tn.over are for models that are whole on every rank. Give every rank a closure on "
    "its part of one batch, or leave out tn.shard."
)
_UNDER_DDP = (
    "process_group: the batches of tn.over are not for models under DistributedDataParallel, which exchanges in every "
    "forward pass. Call the bare model and give the optimizer process_group=."
)


def record_share(
    closure: Closure,
    params: Sequence[Tensor],
    parallel: DataParallel | None,
    *,
    create_graph: bool = True,
    for_curvature: bool = False,
) -> tuple[Tape | StreamedTape, Alone]:
    """Record a closure; without `parallel` a model under DistributedDataParallel tells its process group.

    Within `whole_parameters` the tape is that of the whole parameters. A closure `for_curvature` alone has samples of
    its own.
    """
    whole = present()

    def run() -> Tape | StreamedTape:
        if whole is None:
            return _bare(tape_of(closure, params, create_graph=create_graph))
        if isinstance(closure, Objective) and closure.is_streamed:
            raise ValueError(_IN_PARTS)
        with kept_gradients(whole.tensors):  # which nobody reads
            return record(closure, whole.tensors, create_graph=create_graph)

    if whole is not None:
        return ShardedShare.recorded(whole.parallel.for_curvature() if for_curvature else whole.parallel, run)
    if parallel is not None:
        if any(vectors.is_distributed(p) for p in params):
            raise ValueError(
                "process_group: parameters that are DTensors are summed over by torch itself; leave process_group out "
                "and give all ranks the same samples."
            )
        return Share.recorded(parallel.for_curvature() if for_curvature else parallel, run)
    try:
        tape = run()
    except BaseException as error:
        group = _group_of_ddp(params)
        if group is not None:
            DataParallel(group).processes.tell_failure(error)
        raise
    if isinstance(tape, Tape) and tape.buffers.process_group is not None:
        return Share.recorded(DataParallel(tape.buffers.process_group), lambda: tape)
    return tape, next((p.share for p in params if hasattr(p, "share")), Alone())  # told by `CutLinear`


def average_share(
    objective: Objective,
    params: Sequence[Tensor],
    curvature: Callable[[Tape], LinearOperator],
    parallel: DataParallel | None,
) -> tuple[LinearOperator, StreamedTape]:
    """The curvature of many batches on every rank, weighted over all ranks, and the tape of this one's pass."""
    made: list[Average] = []

    def run() -> StreamedTape:
        if present() is not None:
            raise ValueError(_IN_PARTS)
        made.append(Average(objective, params, curvature=curvature))
        return _bare(made[0].tape)

    tape, share = (run(), Alone()) if parallel is None else Share.recorded(parallel, run)
    return share.operator(made[0]), tape


def gradient_processes(params: Sequence[Tensor], ddp_group: ProcessGroup | None) -> Processes | None:
    """Those over which `backward` adds up gradients: of DistributedDataParallel, or of parameters in parts."""
    cut = next((p for p in params if is_shard(p)), None)
    if ddp_group is None and cut is not None:
        ddp_group = as_dtensor(cut).device_mesh.get_group()
    return None if ddp_group is None else Processes(ddp_group)


def _group_of_ddp(params: Sequence[Tensor]) -> ProcessGroup | None:
    """That of a living DistributedDataParallel with one of these parameters: the closure failed before it told."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.nn.parallel import DistributedDataParallel

    mine = {id(p) for p in params}
    wrapped = [m for m in gc.get_objects() if issubclass(type(m), DistributedDataParallel)]
    return next((m.process_group for m in wrapped if any(id(p) in mine for p in m.parameters())), None)


def _bare(tape: Recorded) -> Recorded:
    """The tape, unless it is streamed and of a model under DistributedDataParallel."""
    if isinstance(tape, StreamedTape) and tape.buffers.process_group is not None:
        tape.buffers.restore()
        raise ValueError(_UNDER_DDP)
    return tape
