"""Parameters of which every rank stores a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchnewton import vectors
from torchnewton.distributed.data_parallel import DataParallel
from torchnewton.distributed.layout import MESH, Layout, as_dtensor, is_shard, laid, rows_of
from torchnewton.distributed.processes import Processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(module: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Store every parameter of a module in parts, one on each rank; returns the module, changed in place.

        model = tn.shard(model)                       # on all ranks; then make the optimizer
        optimizer = tn.Newton(model.parameters())
        optimizer.step(closure)                       # the ordinary closure, each rank with its own samples

    A parameter becomes a DTensor that is cut in its first dimension, ⌈n / ranks⌉ of n rows on the first ranks and
    perhaps none on the last; a parameter without a dimension is on every rank. Gradient, Krylov vectors and the
    vectors of the optimizer's state lie alike. `module.weight` read by the module's own code is the whole parameter;
    `parameters()` and `state_dict()`, whose names stay, have the parts. `load_state_dict` takes whole tensors, too.
    All ranks start with the values and buffers of rank 0; buffers stay whole.

    Within `step` of `Newton` and of the methods made of it every rank has its own samples, weighted as by
    `DataParallel`, and the parameters are whole once, as the graph needs them. Outside of it the module gathers each
    parameter when it is used, so that all ranks must call it together; `backward` adds up the ranks' gradients.

    Args:
        module: may use a parameter several times or in several places. Parameters that are frozen are cut, too.
        mesh: a mesh of one dimension; by default all ranks.

    Cost: in a step, P numbers received for each product and P sent, P sent for the gradient, 2P received for each
    evaluation elsewhere. Memory of a rank: P / ranks for the parameters and each vector; P for the whole parameters
    until the step ends; and within a product 2P for the whole vector and the result.
    Errors: `ValueError` for a mesh of more dimensions, parameters that are DTensors already, and modules that are under
    `DistributedDataParallel` or FSDP.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_initialized():
        raise ValueError(
            'shard: torch.distributed is not initialized; call init_process_group("gloo") (or "nccl") first, and '
            "launch the program with torchrun."
        )
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(f"shard: mesh={mesh} has {mesh.ndim} dimensions; give one of them, as mesh['dp'].")
    _check(module)
    group = mesh.get_group() if mesh is not None else dist.group.WORLD
    device = next((p.device.type for p in module.parameters()), "cpu")
    processes = Processes(group)  # type: ignore[arg-type]
    named = DeviceMesh.from_group(group, device, mesh_dim_names=(MESH,))  # type: ignore[arg-type]
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        names = [name for name, p in part._parameters.items() if p is not None]
        for name in names:
            p = part._parameters[name]
            assert p is not None  # for mypy
            if id(p) not in made:
                made[id(p)] = _cut(p, named, processes)
        if names:
            _store(part, {name: made[id(part._parameters[name])] for name in names})
        for buffer in part._buffers.values():
            if buffer is not None:
                buffer.data.copy_(processes.of_first([buffer.detach()])[0])
    return module


def _check(module: nn.Module) -> None:
    for name, part in module.named_modules():
        kinds = {base.__name__ for base in type(part).__mro__}
        for kind in kinds & {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"}:
            raise ValueError(
                f"shard: module {name or type(part).__name__!r} is under {kind}, which stores or reduces parameters "
                "itself; give the bare module."
            )
    for name, p in module.named_parameters():
        if vectors.is_distributed(p):
            raise ValueError(
                f"shard: the parameter {name!r} is a DTensor already; layers that are cut over ranks cannot be stored "
                "in parts as well."
            )


def _cut(p: nn.Parameter, mesh: DeviceMesh, processes: Processes) -> nn.Parameter:
    """The part of rank 0's values that belongs here."""
    (whole,) = processes.of_first([p.detach()])
    if whole.dim():
        whole = whole[rows_of(len(whole), processes.rank, processes.size)].clone()
    return nn.Parameter(laid(whole, mesh, p.shape), requires_grad=p.requires_grad)


def _store(module: nn.Module, params: dict[str, nn.Parameter]) -> None:
    """Put in the parts under the old names, and let the module's code read whole parameters there."""
    module._parameters.update(params)
    readers: dict[str, Any] = {name: property(partial(_read, name=name)) for name in params}
    if isinstance(module, nn.RNNBase):
        readers["_flat_weights"] = property(_flat_weights, lambda *_: None)
    kind = type(module)
    module.__class__ = type(f"Sharded{kind.__name__}", (kind,), readers)
    module.register_load_state_dict_pre_hook(_cut_state)


def _read(module: nn.Module, name: str) -> Tensor | None:
    p = module._parameters[name]
    return p if p is None else whole_of(p)


def _flat_weights(module: nn.Module) -> list[Tensor | None]:
    return [_read(module, name) for name in module._flat_weights_names]  # type: ignore[union-attr]


def _cut_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Whole tensors in a state that is loaded are cut."""
    for name, p in module._parameters.items():
        found = state.get(prefix + name)
        if p is None or not is_shard(p) or not isinstance(found, Tensor) or vectors.is_distributed(found):
            continue
        if found.shape == p.shape:  # else the module says what is wrong
            (state[prefix + name],) = vectors.unflatten(found.to(p.device).reshape(-1), [p])


class Whole:
    """The whole parameters of a step: leaves of the recorded graph that stand where the module reads parameters."""

    def __init__(self, params: Sequence[Tensor], parallel: DataParallel) -> None:
        self.params, self.parallel = list(params), parallel
        self.layout = Layout(params, parallel.processes)
        with torch.no_grad():
            found = self.layout.gathered([p.detach() if is_shard(p) else p for p in params])
        self.tensors = [w if w is p else w.requires_grad_() for w, p in zip(found, params, strict=True)]
        self.of = {id(p): w for p, w in zip(params, self.tensors, strict=True)}

    def renew(self) -> None:
        """Take over the parameters' present values; a recorded graph stays valid once the old ones are back."""
        self.layout.gather_into([w.data for w in self.tensors], [p.detach() for p in self.params])

    def release(self) -> None:
        """Give the memory back, though a preconditioner may remember the tensors for their shapes: one NaN is left."""
        for whole, p in zip(self.tensors, self.params, strict=True):
            if whole is not p:
                whole.grad = None
                whole.data = whole.new_full((), math.nan).expand(whole.shape)


_PRESENT: ContextVar[Whole | None] = ContextVar("whole", default=None)


def present() -> Whole | None:
    """The whole parameters of the step that is being made."""
    return _PRESENT.get()


@contextmanager
def whole_parameters(params: Sequence[Tensor], parallel: DataParallel | None) -> Iterator[None]:
    """Inside, modules whose parameters are cut read them whole; for other parameters this does nothing.

    Raises:
        ValueError: if `parallel` has other processes than those that hold the parts.
    """
    cut = [p for p in params if is_shard(p)]
    if not cut:
        yield
        return
    group = as_dtensor(cut[0]).device_mesh.get_group()
    parallel = DataParallel(group) if parallel is None else parallel
    if dist.get_process_group_ranks(parallel.processes.group) != dist.get_process_group_ranks(group):
        raise ValueError("process_group: the parameters are in parts on other ranks; give the group of shard's mesh.")
    whole = Whole(params, parallel)
    token = _PRESENT.set(whole)
    try:
        yield
    finally:
        _PRESENT.reset(token)
        whole.release()


def whole_of(p: Tensor) -> Tensor:
    """What the module's code reads: of the step if there is one, else gathered so that `backward` adds up the ranks."""
    if not is_shard(p):
        return p
    whole = present()
    if whole is not None and id(p) in whole.of:
        return whole.of[id(p)]
    from torch.distributed.tensor import Partial, Replicate

    gathered: Callable[..., Tensor] = as_dtensor(p).redistribute(placements=[Replicate()]).to_local
    return gathered(grad_placements=[Partial()])
