"""What the ranks do for `test_failures`: rank 1 alone raises, and all go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from data_parallel_cases import flat
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchnewton as tn
from torchnewton.optim.regime import RegimeChoice


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def make_batch(rank: int, step: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (20,), generator=generator)


def parallel() -> tn.DataParallel:
    return tn.DataParallel(timeout=10.0)


def outcome(optimizer: tn.Newton, closure: Callable[[], Tensor]) -> str:
    try:
        optimizer.step(closure)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return optimizer.report.status


class Raising:
    """A closure that raises in one of its calls."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, call: int = 0, error: Any = RuntimeError) -> None:
        self.model, self.x, self.y, self.call, self.error, self.calls = model, x, y, call, error, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise self.error("boom")
        return F.cross_entropy(self.model(self.x), self.y)


def failing(rank: int, dtype: torch.dtype, steps: int, call: int, error: Any, same: bool) -> Any:
    """What is raised in a call of the last of some steps, whether nothing moved, and the parameters a step later."""
    model = make_model(dtype)
    optimizer = tn.Newton(model.parameters(), process_group=parallel())
    for step in range(steps):
        optimizer.step(Raising(model, *make_batch(rank, 0 if same else step, dtype)))
    before = flat(model)
    batch = make_batch(rank, 0 if same else steps, dtype)
    said = outcome(optimizer, Raising(model, *batch, call if rank == 1 else 0, error))
    unmoved, regime = torch.equal(before, flat(model)), optimizer._memory["regime"]["exact"]
    outcome(optimizer, Raising(model, *batch))
    return said, unmoved, regime, flat(model)


def on_failures(rank: int, size: int) -> Any:
    """In the second-order correction, at a trial point, and in a product by differences of outputs."""
    exact = {call: failing(rank, torch.float64, 3, call, RuntimeError, True) for call in (2, 4)}
    return {**exact, "product": failing(rank, torch.float32, 1, 2, RuntimeError, False)}


def on_other_courses(rank: int, size: int) -> Any:
    """Errors after which an optimizer may go on, in the correction: all ranks go on, or none."""
    return [failing(rank, torch.float64, 3, 2, error, True) for error in (ValueError, tn.RecordError)]


def on_left_domain(rank: int, size: int) -> Any:
    """Steps that were not tested lead rank 1 alone to a point where its loss is not defined."""
    model = make_model()
    optimizer = tn.Newton(model.parameters(), process_group=parallel())
    optimizer.choice = RegimeChoice(gradients=0.0, flops=0.0)
    for step in range(40):
        gone = optimizer._memory["glide"]["gone"]
        said = outcome(optimizer, Raising(model, *make_batch(rank, step % 5), int(gone > 0 and rank == 1), ValueError))
        if gone:
            break
    return gone, said, optimizer._memory["glide"]["gone"], flat(model)


def on_first_step_under_ddp(rank: int, size: int) -> Any:
    """Before the optimizer knows of other processes."""
    model = make_model()
    called = DistributedDataParallel(model)
    optimizer = tn.Newton(model.parameters())
    said = outcome(optimizer, Raising(called, *make_batch(rank), rank))
    outcome(optimizer, Raising(called, *make_batch(rank)))
    return said, optimizer.report.accepted, flat(model)
