"""A parameter server on torch.distributed.rpc whose workers come, go and die as they like."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlparse

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch._C._distributed_rpc import TensorPipeAgent

# torch.distributed is imported where it is used: some builds of PyTorch come without it
Gradient = Sequence[Tensor | None]

SERVER = "server"
_BACKEND = "TORCHNEWTON_OPEN_GROUP"
_serving: list[ParameterServer] = []  # the one of this process: a remote call finds it here
_kept: list[Store] = []  # the address book for tcp lives as long as the server's end of it


class ServedOptimizer(Protocol):
    """What a server does with a gradient, as `tn.DCASGD`."""

    param_groups: list[dict[str, Any]]

    def send(self, worker: str, /) -> list[Tensor]:
        """The parameters as they are, remembered as what this worker has."""
        ...

    def receive(self, worker: str, gradient: Gradient, /) -> str:
        """Move by this worker's gradient; why it was dropped, or nothing."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed server needs."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from it."""
        ...


class ParameterServer:
    """Keeps the parameters; workers push gradients and get the parameters back, in the order in which they come.

        optimizer = tn.DCASGD(model.parameters(), lr=0.1)
        with tn.ParameterServer(optimizer, "tcp://localhost:29500", checkpoint=Path("server.pt")) as server:
            server.wait(num_updates=10_000)

    A worker may join at any time; one that dies is not waited for, and may come back under its name. A gradient that is
    not finite is dropped; `dropped` has the worker's name and the reasons. Every `checkpoint_every` updates parameters
    and the optimizer's state are written, and read again where the file exists.

    Args:
        optimizer: `tn.DCASGD` over the model's parameters; a gradient is applied under a lock.
        address: `tcp://host:port`, or `file:///path` on one machine, the same for all.
        checkpoint: the file; none.
        checkpoint_every: updates between two checkpoints; one more is written at the end.
        timeout: seconds that a remote call may take.

    Errors: `ValueError` for an address of another kind, and for gradients of other shapes, raised at the worker.
    """

    def __init__(
        self,
        optimizer: ServedOptimizer,
        address: str,
        *,
        checkpoint: Path | None = None,
        checkpoint_every: int = 100,
        timeout: float = 60.0,
    ) -> None:
        if checkpoint_every < 1:
            raise ValueError(f"ParameterServer: checkpoint_every={checkpoint_every} must be at least 1.")
        self.optimizer, self.address, self.timeout = optimizer, _checked(address), timeout
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        self.num_updates = 0
        self.updates_of: dict[str, int] = {}
        self.dropped: dict[str, list[str]] = {}
        self._changed = threading.Condition()
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)

    def __enter__(self) -> ParameterServer:
        if _serving:
            raise ValueError("ParameterServer: this process runs one already; leave its with block first.")
        _join(self.address, SERVER, 0, self.timeout)
        _serving.append(self)
        _store(self.address, self.timeout).set("is up", "yes")
        return self

    def __exit__(self, *_: object) -> None:
        _serving.clear()
        _leave()
        with self._changed:
            self._save()

    def wait(self, num_updates: int, timeout: float | None = None) -> bool:
        """Until so many updates were made; False if `timeout` seconds pass before."""
        with self._changed:
            return self._changed.wait_for(lambda: self.num_updates >= num_updates, timeout)

    def send(self, worker: str) -> list[Tensor]:
        """The parameters for a worker that joins or starts anew."""
        with self._changed:
            self.updates_of.setdefault(worker, 0)
            return self.optimizer.send(worker)

    def receive(self, worker: str, gradient: Gradient, failure: str = "") -> tuple[list[Tensor], str]:
        """A worker's gradient, or why it has none: the new parameters, and why the gradient was dropped."""
        with self._changed:
            failure = failure or self.optimizer.receive(worker, gradient)
            if failure:
                self.dropped.setdefault(worker, []).append(failure)
            else:
                self.num_updates += 1
                self.updates_of[worker] = self.updates_of.get(worker, 0) + 1
                self._changed.notify_all()
            new = self.optimizer.send(worker)
            if not failure and self.num_updates % self.checkpoint_every == 0:
                self._save()
            return new, failure

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _save(self) -> None:
        if self.checkpoint is not None:
            state = {
                "params": [p.detach() for p in self._params()],
                "optimizer": self.optimizer.state_dict(),
                "counts": (self.num_updates, self.updates_of, self.dropped),
            }
            temporary = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
            torch.save(state, temporary)
            temporary.replace(self.checkpoint)

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for p, value in zip(self._params(), state["params"], strict=True):
            p.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates, self.updates_of, self.dropped = state["counts"]


class ServerConnection:
    """A worker's way to a `ParameterServer`: `pull()` and `push(gradient)`; leaves without a word to the others.

        with tn.ServerConnection("tcp://localhost:29500", "worker-3") as server:
            optimizer = tn.DCASGDWorker(model.parameters(), server)

    `name` is the worker's; the server keeps its backup under it. Waits up to `timeout` seconds for the server.

    Errors: `ConnectionError` where the server does not answer.
    """

    def __init__(self, address: str, name: str, *, timeout: float = 60.0) -> None:
        self.address, self.name, self.timeout = _checked(address), name, timeout

    def __enter__(self) -> ServerConnection:
        with self._explained():
            store = _store(self.address, self.timeout)
            store.wait(["is up"], timedelta(seconds=self.timeout))
            rank = store.add("ranks", 1)
            _join(self.address, f"worker_{rank}", rank, self.timeout)
        return self

    def __exit__(self, *_: object) -> None:
        _leave()

    def pull(self) -> list[Tensor]:
        """The server's parameters."""
        with self._explained():
            return list(_call(_pull, self.name))

    def push(self, gradient: Gradient, failure: str = "") -> tuple[list[Tensor], str]:
        """Send a gradient, or why there is none; the server's new parameters, and why the gradient was dropped."""
        with self._explained():
            parameters, failure = _call(_push, self.name, [None if g is None else g.cpu() for g in gradient], failure)
        return list(parameters), failure

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ConnectionError(f"the parameter server at {self.address} does not answer: {error}") from error


def _pull(worker: str) -> list[Tensor]:
    return [t.cpu() for t in _serving[0].send(worker)]


def _push(worker: str, gradient: Gradient, failure: str) -> tuple[list[Tensor], str]:
    parameters, failure = _serving[0].receive(worker, gradient, failure)
    return [t.cpu() for t in parameters], failure


def _checked(address: str) -> str:
    found = urlparse(address)
    if (found.scheme == "file" and found.path) or (found.scheme == "tcp" and found.hostname and found.port):
        return address
    raise ValueError(f"address={address!r} must be tcp://host:port, or file:///path on one machine.")


def _store(address: str, timeout: float) -> Store:
    """The address book; the server's process keeps it for tcp."""
    from torch._C._distributed_c10d import FileStore, TCPStore

    found, wait = urlparse(address), timedelta(seconds=timeout)
    if found.scheme == "file":
        return FileStore(found.path)
    return TCPStore(str(found.hostname), int(found.port or 0), is_master=False, timeout=wait)


def _join(address: str, name: str, rank: int, timeout: float) -> None:
    """Become a member of an open group.

    PyTorch's own dynamic group calls every other member when one joins, and fails if one of them has died. Here a
    member only reads the others' addresses: workers talk to the server alone.
    """
    from torch.distributed.rpc import TensorPipeRpcBackendOptions, backend_registry, init_rpc

    if not backend_registry.backend_registered(_BACKEND):
        backend_registry.register_backend(_BACKEND, TensorPipeRpcBackendOptions, _open_group)
    backend = backend_registry.BackendType[_BACKEND]
    options = TensorPipeRpcBackendOptions(rpc_timeout=timeout, init_method=address)
    init_rpc(name, backend=backend, rank=rank, rpc_backend_options=options)


def _open_group(
    store: Store, name: str, rank: int, world_size: int | None, rpc_backend_options: Any
) -> TensorPipeAgent:
    from torch._C._distributed_c10d import PrefixStore
    from torch._C._distributed_rpc import TensorPipeAgent
    from torch.distributed.rpc import api

    # init_rpc numbers its calls within a process in the names of the store; members that come back count anew
    own = PrefixStore("members", _store(rpc_backend_options.init_method, rpc_backend_options.rpc_timeout))
    _kept.append(store)
    agent = TensorPipeAgent(own, name, rank, None, rpc_backend_options, {}, [])
    api._init_rpc_states(agent)
    return agent


def _call(function: Callable[..., Any], *arguments: object) -> Any:
    """At the server."""
    from torch.distributed.rpc import rpc_sync

    return rpc_sync(SERVER, function, args=arguments)


def _leave() -> None:
    """Without waiting for the others."""
    from torch.distributed.rpc import shutdown

    shutdown(graceful=False)
    _kept.clear()
