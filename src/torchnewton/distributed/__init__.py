"""Several processes: arguments for the parts of a Newton step, and what other methods exchange."""

from torchnewton.distributed.blocks import DiagonalBlock, Partition
from torchnewton.distributed.cut_layers import partition
from torchnewton.distributed.data_parallel import Alone, DataParallel, Share
from torchnewton.distributed.diagonalized import Diagonalized, Quorum
from torchnewton.distributed.parameter_server import ParameterServer, ServerConnection
from torchnewton.distributed.processes import Processes, RankError, fingerprint
from torchnewton.distributed.recording import average_share, gradient_processes, record_share
from torchnewton.distributed.reduced import Reduced
from torchnewton.distributed.shard import shard, whole_parameters
from torchnewton.distributed.workers import Workers, find_workers

__all__ = [
    "Alone",
    "DataParallel",
    "DiagonalBlock",
    "Diagonalized",
    "ParameterServer",
    "Partition",
    "Processes",
    "Quorum",
    "RankError",
    "Reduced",
    "ServerConnection",
    "Share",
    "Workers",
    "average_share",
    "find_workers",
    "fingerprint",
    "gradient_processes",
    "partition",
    "record_share",
    "shard",
    "whole_parameters",
]
