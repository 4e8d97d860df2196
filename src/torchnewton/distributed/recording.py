"""`record_share`: the tape of a rank, and its part in the objective of all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchnewton import vectors
from torchnewton.distributed.data_parallel import Alone, DataParallel, Share
from torchnewton.distributed.shard import present
from torchnewton.distributed.sharded import ShardedShare
from torchnewton.record import Closure, Objective, StreamedTape, Tape, kept_gradients, record, tape_of

_STREAMED = (
    "process_group: the batches of tn.over are evaluated in one process. Give every rank a closure on its part of one "
    "batch, or leave out process_group and DistributedDataParallel."
)


def record_share(
    closure: Closure, params: Sequence[Tensor], parallel: DataParallel | None, *, create_graph: bool = True
) -> tuple[Tape | StreamedTape, Alone]:
    """Record a closure; without `parallel` a model under DistributedDataParallel tells its process group.

    Within `whole_parameters` the tape is that of the whole parameters.
    """
    whole = present()

    def run() -> Tape:
        if isinstance(closure, Objective) and closure.is_streamed:
            raise ValueError(_STREAMED)
        if whole is None:
            return record(closure, params, create_graph=create_graph)
        with kept_gradients(whole.tensors):  # which nobody reads
            return record(closure, whole.tensors, create_graph=create_graph)

    if whole is not None:
        return ShardedShare.recorded(whole.parallel, run)
    if parallel is not None:
        if any(vectors.is_distributed(p) for p in params):
            raise ValueError(
                "process_group: parameters that are DTensors are summed over by torch itself; leave process_group out "
                "and give all ranks the same samples."
            )
        return Share.recorded(parallel, run)
    tape = tape_of(closure, params, create_graph=create_graph)
    group = tape.buffers.process_group
    if group is None:
        return tape, next((p.share for p in params if hasattr(p, "share")), Alone())  # told by `CutLinear`
    if isinstance(tape, StreamedTape):
        tape.buffers.restore()
        raise ValueError(_STREAMED)
    return Share.recorded(DataParallel(group), lambda: tape)
