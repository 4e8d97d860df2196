"""What talks to other processes: a parameter server and the exchange between workers."""

from torchnewton.distributed.parameter_server import ParameterServer, ServerConnection

__all__ = ["ParameterServer", "ServerConnection"]
