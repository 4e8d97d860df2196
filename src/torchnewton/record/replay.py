"""Running a closure again: same random numbers, buffers and gradients put back, no graph of the parameters."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from torchnewton.record.errors import RecordError

Closure = Callable[[], Any]


class RandomState:
    """The state of every generator a closure may draw from: torch (CPU and the given GPUs), `random`, NumPy."""

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def is_current(self) -> bool:
        """Whether nothing has been drawn since."""
        numpy = sys.modules.get("numpy")
        same_numpy = True
        if numpy is not None and self._numpy is not None:
            now = numpy.random.get_state()
            same_numpy = now[2:] == self._numpy[2:] and bool((now[1] == self._numpy[1]).all())
        return (
            torch.equal(self._torch, torch.get_rng_state())
            and all(torch.equal(s, torch.cuda.get_rng_state(d)) for d, s in self._cuda.items())
            and self._python == random.getstate()
            and same_numpy
        )

    def restore(self) -> None:
        """Set every generator back."""
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def same_random_numbers(state: RandomState | None, devices: Sequence[torch.device]) -> Iterator[None]:
    """Draw from `state` inside and put the generators back after; with None, for a closure that draws nothing, pass."""
    if state is None:
        yield
        return
    now = RandomState(devices)
    state.restore()
    try:
        yield
    finally:
        now.restore()


Buffers = dict[tuple[nn.Module, str], Tensor]


@contextmanager
def on_first_call(visit: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call `visit` with every module that is called inside and with its parts, before the first call.

    The optimizer knows parameters only; a global forward pre-hook finds the modules that keep buffers.
    """
    seen: set[nn.Module] = set()

    def hook(module: nn.Module, _: Any) -> None:
        if module not in seen:
            for part in module.modules():
                if part not in seen:
                    seen.add(part)
                    visit(part)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class BufferSnapshot:
    """The buffers of the modules called inside `watch()`, as they were before the first call."""

    def __init__(self) -> None:
        self.saved: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self.process_group: Any = None  # of a model under DistributedDataParallel

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Copy the buffers of every module that is called inside."""
        with on_first_call(self._add):
            yield

    def _add(self, module: nn.Module) -> None:
        _refuse_fsdp(module)
        if isinstance(module, DistributedDataParallel):
            self.process_group = module.process_group
        for name, buffer in module._buffers.items():
            if buffer is not None:
                self.saved.append((module, name, buffer, buffer.detach().clone()))

    def renewed(self) -> BufferSnapshot:
        """A snapshot of the same modules as they are now."""
        now = BufferSnapshot()
        for module in {id(entry[0]): entry[0] for entry in self.saved}.values():
            now._add(module)
        return now

    def restore(self) -> None:
        """Put the values back, bit for bit."""
        for module, name, buffer, value in self.saved:
            module._buffers[name] = buffer
            buffer.data.copy_(value)  # through .data: a graph that was recorded with these values stays valid


@contextmanager
def scratch_buffers(before: BufferSnapshot | None = None) -> Iterator[None]:
    """Let modules called inside work on copies of their buffers, with the values of `before` where it has them.

    The buffers themselves are not written to: a recorded graph may need them as they are. So DistributedDataParallel,
    which would copy those of rank 0 into them before every forward pass, leaves that out. Where the recorded run has
    met none, `before` is empty, and nobody looks for them, which would cost a call a module.
    """
    originals: Buffers = {}
    synchronized: list[DistributedDataParallel] = []
    values = {} if before is None else {(module, name): value for module, name, _, value in before.saved}
    if before is not None and not values:
        yield
        return

    def swap(module: nn.Module) -> None:
        if isinstance(module, DistributedDataParallel) and module.require_forward_param_sync:
            module.require_forward_param_sync = False
            synchronized.append(module)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                originals[module, name] = buffer
                module._buffers[name] = values.get((module, name), buffer).detach().clone()

    try:
        with on_first_call(swap):
            yield
    finally:
        for (module, name), buffer in originals.items():
            module._buffers[name] = buffer
        for parallel in synchronized:
            parallel.require_forward_param_sync = True


def _refuse_fsdp(module: nn.Module) -> None:
    """FSDP keeps sharded parameters out of the autograd graph: no product with the curvature is possible."""
    if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__):
        raise RecordError(
            f"{type(module).__name__} is managed by FSDP: its sharded parameters are not in the autograd graph, so no "
            "curvature product exists. Use tn.shard, which stores parameters in parts, DistributedDataParallel or "
            "tensor parallelism (DTensor parameters) instead."
        )


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Choose implementations that can be differentiated twice: eager code and plain attention."""
    with sdpa_kernel(SDPBackend.MATH), eager_code():
        yield


@contextmanager
def eager_code() -> Iterator[None]:
    """Leave out what `torch.compile` has made or would make: no hook finds the modules in it, and it traces hooks."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*global.*hooks.*")  # of no concern to eager code
        yield


@contextmanager
def without_graph(params: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that require no gradient, so that a forward pass keeps no graph of them.

    Unlike `torch.no_grad` this leaves derivatives with respect to the inputs alive (physics-informed losses) and
    holds inside `torch.enable_grad` as well. `param.grad` is put back at the end.
    """
    saved = [(p, p.requires_grad, p.grad) for p in params]
    try:
        for p in params:
            p.grad = None
            p.requires_grad_(False)
        yield
    finally:
        for p, requires_grad, grad in saved:
            p.requires_grad_(requires_grad)
            p.grad = grad


@contextmanager
def moved(params: Sequence[Tensor], direction: Sequence[Tensor], length: float) -> Iterator[None]:
    """Parameters at θ + `length`·d inside, put back bit for bit after."""
    kept = [p.detach().clone() for p in params]
    try:
        # through .data: a recorded graph stays valid, since the values it saved come back
        for p, d in zip(params, direction, strict=True):
            p.data.add_(d, alpha=length)
        yield
    finally:
        for p, k in zip(params, kept, strict=True):
            p.data.copy_(k)


@contextmanager
def kept_gradients(params: Sequence[Tensor]) -> Iterator[None]:
    """Put `param.grad` back at the end."""
    saved = [(p, p.grad) for p in params]
    try:
        for p in params:
            p.grad = None
        yield
    finally:
        for p, grad in saved:
            p.grad = grad


@contextmanager
def refuse_grad_scaler() -> Iterator[None]:
    """Let `GradScaler.scale` inside a closure say why it cannot be used."""
    owner, name = torch.amp.GradScaler, "scale"
    original = getattr(owner, name)

    def scale(self: torch.amp.GradScaler, losses: Any) -> Any:
        if self.is_enabled():
            raise RecordError(
                "torch.amp.GradScaler scales the loss, which a Newton step cannot use: take bfloat16 autocast, which "
                "needs no scaler, or GradScaler(enabled=False)."
            )
        return original(self, losses)

    setattr(owner, name, scale)
    try:
        yield
    finally:
        setattr(owner, name, original)
