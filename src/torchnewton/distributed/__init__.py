"""Several processes: arguments for the parts of a Newton step, no second versions of them."""

from torchnewton.distributed.data_parallel import Alone, DataParallel, Share, record_share
from torchnewton.distributed.diagonalized import Diagonalized, Quorum
from torchnewton.distributed.partition import DiagonalBlock, Partition
from torchnewton.distributed.processes import Processes, RankError
from torchnewton.distributed.reduced import Reduced

__all__ = [
    "Alone",
    "DataParallel",
    "DiagonalBlock",
    "Diagonalized",
    "Partition",
    "Processes",
    "Quorum",
    "RankError",
    "Reduced",
    "Share",
    "record_share",
]
