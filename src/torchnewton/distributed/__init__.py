"""What talks to other processes: a parameter server and the exchange between workers."""

from torchnewton.distributed.parameter_server import ParameterServer, ServerConnection
from torchnewton.distributed.workers import Workers, find_workers

__all__ = ["ParameterServer", "ServerConnection", "Workers", "find_workers"]
