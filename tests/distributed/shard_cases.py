"""What the ranks do for `test_shard`: parameters in parts, every rank with its own samples."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data_parallel_cases import make_batch, part, plane
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import torchnewton as tn
from torchnewton.optim.regime import RegimeChoice

STEPS = 10
SHORT = 3
FLAT = tn.LevenbergMarquardt(initial=1.0, minimum=0.1)  # a solve that does not magnify the last bits
CG = tn.CG(rtol=1e-2, max_iterations=6)


class Exact(RegimeChoice):
    """Where Kronecker factors are not to be had."""

    def allows_plane(self, tape: Any) -> bool:
        return False


def exact(params: Any) -> tn.Newton:
    """Without arguments, but "exact" from the start and for good: see `on_kronecker_factors` for "plane"."""
    optimizer = tn.Newton(params)
    optimizer.choice = Exact()
    return optimizer


METHODS: dict[str, Callable[..., tn.Newton]] = {
    "default": exact,
    "cg": partial(tn.Newton, solver=CG, damping=FLAT),
    "sgn": partial(tn.SGN, momentum=0.3, damping=0.1, min_damping=0.1, max_iterations=5),
    "newton-cg": tn.NewtonCG,
    "newton-krylov": tn.NewtonKrylov,
    "hessian-free": partial(tn.HessianFree, damping=10.0),
}
OTHERS: dict[str, Callable[..., tn.Newton]] = {  # for fewer steps
    "plane": partial(tn.Newton, solver=tn.Plane(), damping=tn.LevenbergMarquardt(initial=0.1)),
    "martens": partial(tn.HessianFree, curvature=tn.GaussNewton, max_iterations=8),
    "decays": lambda params: tn.Newton(groups(params), solver=CG, damping=FLAT, momentum=0.2),
    "preconditioned": partial(tn.SGN, preconditioner_exponent=0.5, damping=0.1, min_damping=0.1, max_iterations=4),
    "complex": partial(tn.NewtonKrylov, curvature=tn.ComplexStepHessian.of),
}


class Net(nn.Module):
    """Sizes that no number of ranks divides, a scalar, a weight used twice and once more in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.again = nn.Linear(7, 7)
        self.again.weight = self.middle.weight
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.register_buffer("offset", torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.middle(torch.tanh(self.middle(h))))
        return self.last(torch.tanh(self.again(h))) * self.scale + self.offset


def groups(params: Any) -> list[dict[str, Any]]:
    params = list(params)
    return [{"params": params[:3], "weight_decay": 1e-2}, {"params": params[3:], "weight_decay": 0.0}]


def make_model(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return Net().double()


def closure_of(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), F.one_hot(y, 3).double(), reduction=reduction)
        loss.backward()
        return loss

    return closure


def whole_of(model: nn.Module) -> Tensor:
    return torch.cat([tn.vectors.flatten([p.detach()]) for p in model.parameters()])


def train(
    make: Callable[..., tn.Newton],
    share: Callable[..., Any],
    cut: bool,
    steps: int = STEPS,
    subset: bool = False,
    reduction: str = "mean",
) -> tuple[Tensor, list[Any]]:
    """Parameters after some steps with a new batch each, and (loss, λ, iterations) of every step."""
    model = make_model()
    if cut:
        tn.shard(model)
    optimizer = make(model.parameters())
    found = []
    for step in range(steps):
        closure = closure_of(model, *share(make_batch(step)), reduction)
        other = closure_of(model, *share(make_batch(100 + step)), reduction) if subset else None
        optimizer.step(closure, curvature=other)
        report = optimizer.report
        found.append((report.loss, report.damping, report.inner_iterations, report.accepted))
    return whole_of(model), found


def whole(name: str, **how: Any) -> tuple[Tensor, list[Any]]:
    """One process."""
    return train({**METHODS, **OTHERS}[name], lambda batch: batch, False, **how)


def on_methods(rank: int, size: int) -> Any:
    return {name: train(make, partial(part, rank=rank, size=size), True) for name, make in METHODS.items()}


def on_others(rank: int, size: int) -> Any:
    share = partial(part, rank=rank, size=size)
    return {name: train(make, share, True, steps=SHORT) for name, make in OTHERS.items()}


def on_uneven(rank: int, size: int) -> Any:
    return train(METHODS["cg"], partial(part, rank=rank, size=size, uneven=True), True, steps=SHORT)


def on_subset(rank: int, size: int) -> Any:
    """Another batch for the curvature."""
    share = partial(part, rank=rank, size=size, uneven=True)
    return train(METHODS["newton-cg"], share, True, steps=SHORT, subset=True)


def on_sums(rank: int, size: int) -> Any:
    share = partial(part, rank=rank, size=size, uneven=True)
    return train(METHODS["cg"], share, True, steps=SHORT, reduction="sum")


def on_empty_rank(rank: int, size: int) -> Any:
    """All samples on rank 0."""
    return train(METHODS["cg"], lambda batch: tuple(t if rank == 0 else t[:0] for t in batch), True, steps=SHORT)


def on_kronecker_factors(rank: int, size: int) -> Any:
    """The flagship where no factorization is cheap: in parts, and with the parameters on every rank."""
    found = []
    for cut in (True, False):
        model = make_model()
        optimizer = plane(tn.shard(model)) if cut else plane(model, process_group=dist.group.WORLD)
        solvers = []
        for step in range(26):
            optimizer.step(closure_of(model, *part(make_batch(step), rank, size, uneven=True)))
            solvers.append(optimizer.report.solver)
        found.append((whole_of(model), optimizer.report.regime, optimizer.report.loss, solvers))
    return found


def parts(tensors: Any) -> int:
    """Bytes of DTensors on this rank, each part once."""
    local = [x.detach().to_local() for x in tensors if isinstance(x, DTensor)]
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in local if x.numel()}.values())


class Watching:
    """CG that counts the bytes of all DTensors that are alive in its products."""

    def __init__(self) -> None:
        self.solver, self.most = tn.CG(rtol=0.0, max_iterations=3), 0

    def solve(self, A: Any, b: Any, x0: Any = None, preconditioner: Any = None) -> Any:
        watching = self

        class Watched:
            def __matmul__(self, v: Any) -> Any:
                watching.most = max(watching.most, parts(x for x in gc.get_objects() if issubclass(type(x), DTensor)))
                return A @ v

        return self.solver.solve(Watched(), b, x0, preconditioner)


def on_bytes(rank: int, size: int) -> Any:
    """Bytes on this rank: parameters, the vectors alive in a solve, optimizer state, and what is whole after a step."""
    gc.collect()
    before = parts(x for x in gc.get_objects() if issubclass(type(x), DTensor))
    solver, model = Watching(), tn.shard(make_model())
    optimizer = tn.Newton(model.parameters(), solver=solver, momentum=0.5, preconditioner=tn.KFAC())
    for step in range(2):
        optimizer.step(closure_of(model, *part(make_batch(step), rank, size)))
    state = [x for entries in optimizer.state.values() for x in entries.values() if isinstance(x, Tensor)]
    kept = optimizer.preconditioner._params  # whole in shape, one number in memory
    whole = sum(p.untyped_storage().nbytes() for p in kept)
    return parts(model.parameters()), solver.most - before, parts(state), len(state), whole, len(kept)


def on_stored(rank: int, size: int) -> Any:
    """What the module looks like from outside."""
    torch.manual_seed(5)
    data = make_batch()
    model, plain = make_model(seed=rank), make_model(seed=0)
    tn.shard(model)
    names = list(model.state_dict()), list(plain.state_dict())
    start = torch.equal(whole_of(model), whole_of(plain))
    rows = [len(p.to_local()) if p.dim() else 1 for p in model.parameters()]
    closure_of(model, *part(data, rank, size), "sum")()
    closure_of(plain, *data, "sum")()
    gradients = [(p.grad.full_tensor(), q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True)]
    model.load_state_dict(make_model(seed=7).state_dict())
    loaded = torch.equal(whole_of(model), whole_of(make_model(seed=7)))
    again = tn.shard(make_model(seed=9))
    again.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model).float()
    optimizer = tn.Newton(copied.parameters(), solver=CG)
    optimizer.step(lambda: F.mse_loss(copied(data[0].float()), F.one_hot(data[1], 3).float()))
    return {
        "names": names,
        "rank 0's": start,
        "rows": rows,
        "gradients": gradients,
        "loaded": loaded,
        "between": torch.equal(whole_of(again), whole_of(model)),
        "outputs": (model(data[0]) - again(data[0])).norm().item(),
        "single": (optimizer.report.accepted, whole_of(copied).dtype),
        "tied": model.again._parameters["weight"] is model.middle._parameters["weight"],
        "refused": message_of(lambda: model.load_state_dict({**plain.state_dict(), "scale": torch.zeros(2)})),
    }


def saddle_steps(cut: bool) -> Any:
    """At a saddle, where the gradient vanishes: Lanczos finds the way out."""
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False)).double()
    for p in model.parameters():
        p.data.zero_()
    optimizer = tn.NewtonKrylov((tn.shard(model) if cut else model).parameters())
    x = make_batch()[0]
    found = []
    for _ in range(4):
        optimizer.step(lambda: F.mse_loss(model(x), x[:, :3]))
        found.append((optimizer.report.solver, optimizer.report.loss))
    return whole_of(model), found


def on_saddle(rank: int, size: int) -> Any:
    return saddle_steps(True)


class Text(nn.Module):
    """Embedding with a tied decoder, LSTM, BatchNorm, attention; one weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.inner = nn.Linear(6, 6, bias=False)
        self.inner.weight.requires_grad_(False)
        self.bias = nn.ParameterList([torch.zeros(9)])
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.embedding(x))[0]
        h = self.inner(h + self.attention(h, h, h)[0])
        return F.linear(self.norm(h.mean(1)), self.embedding.weight, self.bias[0])


def text_steps(cut: bool) -> Any:
    """The same samples on every rank, since BatchNorm sees those of its own alone."""
    torch.manual_seed(3)
    model = Text().double()
    if cut:
        tn.shard(model)
    optimizer = tn.Newton((p for p in model.parameters() if p.requires_grad), solver=CG, damping=FLAT)
    x, y = torch.randint(9, (16, 4)), torch.randint(9, (16,))
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    return whole_of(model), int(model.norm.num_batches_tracked), optimizer.report.accepted


def on_layers(rank: int, size: int) -> Any:
    return text_steps(True)


def message_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def on_failures(rank: int, size: int) -> Any:
    """A closure that fails on one rank, a sample that is not a number on another, and steps between."""
    model = tn.shard(make_model())
    optimizer = tn.Newton(model.parameters(), solver=CG)
    x, y = part(make_batch(), rank, size)
    closure = closure_of(model, x, y)
    optimizer.step(closure)
    before = whole_of(model)
    failed = message_of(lambda: optimizer.step(closure_of(model, x[:, :4] if rank == 1 else x, y)))
    optimizer.step(closure_of(model, torch.full_like(x, math.nan) if rank == size - 1 else x, y))
    untouched, status = torch.equal(whole_of(model), before), optimizer.report.status
    optimizer.step(closure)
    return failed, untouched, status, optimizer.report.accepted, not torch.equal(whole_of(model), before)


def on_refusals(rank: int, size: int) -> Any:
    model = tn.shard(make_model())
    closure = closure_of(model, *part(make_batch(), rank, size))
    alone = [dist.new_group([r]) for r in range(size)][rank]
    return {
        "twice": message_of(lambda: tn.shard(model)),
        "ddp": message_of(lambda: tn.shard(DistributedDataParallel(make_model()))),
        "mesh": message_of(lambda: tn.shard(make_model(), init_device_mesh("cpu", (2, size // 2)))),
        "group": message_of(lambda: tn.Newton(model.parameters(), process_group=alone).step(closure)),
        "stream": message_of(lambda: tn.Newton(model.parameters()).step(tn.over([closure, closure]))),
        "partition": message_of(
            lambda: tn.partition(tn.shard(nn.Sequential(nn.Linear(5, 3))), init_device_mesh("cpu", (2, size // 2)))
        ),
        "blocks": message_of(lambda: tn.DistributedNewton(model.parameters()).step(closure)),
    }
