"""What the ranks do for `test_data_parallel`; with `whole` the same on all samples in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torchnewton as tn
from torchnewton import vectors
from torchnewton.distributed import record_share
from torchnewton.optim.regime import RegimeChoice

METHODS: dict[str, Callable[..., tn.Newton]] = {
    "newton": tn.Newton,
    "direct": partial(tn.Newton, solver=tn.Direct(), weight_decay=1e-3),
    "cg": partial(tn.Newton, solver=tn.CG(rtol=1e-2, max_iterations=10), damping=tn.LevenbergMarquardt(initial=0.1)),
    "plane": partial(tn.Newton, solver=tn.Plane(), damping=tn.LevenbergMarquardt(initial=0.1)),
    "sgn": partial(tn.SGN, momentum=0.3),
    "newton-cg": tn.NewtonCG,
    "newton-krylov": tn.NewtonKrylov,
    "hessian-free": partial(tn.HessianFree, damping=10.0),
    "martens": partial(tn.HessianFree, curvature=tn.GaussNewton, max_iterations=8),
}
STEPS = 10
GLIDING = 30  # steps after which some have glided
UNEVEN = (9, 50, 20, 49)


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def make_batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(3, (128,), generator=generator)
    return torch.randn(128, 5, generator=generator, dtype=torch.float64) + 0.5 * F.one_hot(y, 5), y


def part(tensors: tuple[Tensor, Tensor], rank: int, size: int, uneven: bool = False) -> tuple[Tensor, Tensor]:
    """The samples of one rank."""
    lengths = [128 // size] * size
    if uneven:
        lengths = list(UNEVEN) if size == 4 else [30, 98]
    x, y = (t.split(lengths)[rank] for t in tensors)
    return x, y


def closure_of(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), F.one_hot(y, 3).double(), reduction=reduction)
        loss.backward()
        return loss

    return closure


def stream_of(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """The same loss in batches of 7."""
    return tn.over(list(zip(x.split(7), y.split(7), strict=True)), lambda batch: closure_of(model, *batch)())


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(
    make: Callable[..., tn.Newton],
    share: Callable[..., Any],
    steps: int = 4,
    ddp: bool = False,
    subset: bool = False,
    make_closure: Callable[..., Any] = closure_of,
    **how: Any,
) -> tuple[Tensor, list[Any]]:
    """Parameters after some steps with a new batch each, and (loss, λ, iterations) of every step."""
    model = make_model()
    called = DistributedDataParallel(model) if ddp else model
    optimizer = make(model.parameters())
    found = []
    for step in range(steps):
        closure = make_closure(called, *share(make_batch(step)), **how)
        other = make_closure(called, *share(make_batch(100 + step)), **how) if subset else None
        optimizer.step(closure, curvature=other)
        report = optimizer.report
        found.append((report.loss, report.damping, report.inner_iterations, report.accepted))
    return flat(model), found


def whole(name: str, **how: Any) -> tuple[Tensor, list[Any]]:
    """One process."""
    return train(METHODS[name], lambda batch: batch, **how)


def on_even(rank: int, size: int) -> dict[str, Any]:
    share = partial(part, rank=rank, size=size)
    names = METHODS if size == 4 else ("newton", "sgn")
    return {name: train(partial(METHODS[name], process_group=dist.group.WORLD), share, steps=STEPS) for name in names}


def on_uneven(rank: int, size: int) -> Any:
    share = partial(part, rank=rank, size=size, uneven=True)
    return train(partial(METHODS["cg"], process_group=dist.group.WORLD), share)


def on_subset(rank: int, size: int) -> Any:
    share = partial(part, rank=rank, size=size, uneven=True)
    return train(partial(METHODS["newton-cg"], process_group=dist.group.WORLD), share, subset=True)


def on_sums(rank: int, size: int) -> Any:
    share = partial(part, rank=rank, size=size, uneven=True)
    return train(partial(METHODS["cg"], process_group=dist.group.WORLD), share, reduction="sum")


def marked(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """A sum over the samples which does not tell that it is one."""

    def closure() -> Tensor:
        model.zero_grad()
        loss = (tn.outputs(model(x)) - F.one_hot(y, 3)).square().sum()
        loss.backward()
        return loss

    return closure


def on_marked(rank: int, size: int) -> Any:
    share = partial(part, rank=rank, size=size, uneven=True)
    return train(partial(METHODS["cg"], process_group=tn.DataParallel(summed=True)), share, make_closure=marked)


def on_ddp(rank: int, size: int) -> Any:
    return train(METHODS["direct"], partial(part, rank=rank, size=size), ddp=True)


def on_empty_rank(rank: int, size: int) -> Any:
    """All samples on rank 0, none elsewhere: its loss and gradient are not a number."""
    return train(
        partial(METHODS["cg"], process_group=dist.group.WORLD),
        lambda batch: tuple(t if rank == 0 else t[:0] for t in batch),
    )


def on_estimates(rank: int, size: int) -> Any:
    """Diagonal, trace, dense matrix and DᵀAD of the reduced operator."""
    model = make_model()
    params = list(model.parameters())
    closure = closure_of(model, *part(make_batch(), rank, size, uneven=True))
    tape, share = record_share(closure, params, tn.DataParallel())
    A = share.operator(tn.GaussNewton(tape))
    v = [torch.ones_like(p) for p in params]
    estimate = A.diagonal(num_samples=50, generator=torch.Generator().manual_seed(rank))
    return {
        "dense": A.to_dense(),
        "diagonal": vectors.flatten(A.diagonal().value),
        "trace": A.trace().value,
        "form": A.quadratic_form([v, tape.gradient])[0] if rank < 0 else A.quadratic_form([v])[0],
        "estimate": (vectors.flatten(estimate.value), vectors.flatten(estimate.standard_error)),
        "each": A.apply_each([v, v]),
    }


def rounded(rank: int, agree: bool) -> tuple[Tensor, list[Any]]:
    """As on machines whose inner products round in another way."""
    original = torch.dot
    torch.dot = lambda a, b: original(a, b) * (1 + rank * 4e-16)
    if not agree:
        kept, vectors._agreed = vectors._agreed, float
    try:
        share = partial(part, rank=rank, size=dist.get_world_size())
        make = partial(tn.Newton, solver=tn.CG(rtol=0.0, max_iterations=8), process_group=dist.group.WORLD)
        return train(make, share)
    finally:
        torch.dot = original
        if not agree:
            vectors._agreed = kept


def on_rounding(rank: int, size: int) -> Any:
    return rounded(rank, True), rounded(rank, False)


def on_kfac(rank: int, size: int) -> Any:
    make = partial(
        tn.Newton,
        solver=tn.Plane(),
        preconditioner=tn.KFAC(statistics_every=2, inverses_every=2),
        damping=tn.LevenbergMarquardt(initial=0.1, minimum=1e-3),
        process_group=dist.group.WORLD,
    )
    return train(make, lambda _: part(make_batch(), rank, size), steps=6)


def plane(model: nn.Module, **how: Any) -> tn.Newton:
    """The flagship where no factorization is cheap."""
    optimizer = tn.Newton(model.parameters(), **how)
    optimizer.choice = RegimeChoice(gradients=0.0, flops=0.0)
    return optimizer


def on_plane(rank: int, size: int) -> Any:
    model = make_model()
    optimizer = plane(model, process_group=dist.group.WORLD)
    found = []
    for step in range(GLIDING):
        optimizer.step(closure_of(model, *part(make_batch(step), rank, size, uneven=True)))
        found.append((optimizer.report.loss, optimizer.report.damping, optimizer.report.solver))
    return flat(model), found


def on_choices(rank: int, size: int) -> Any:
    """By limits of which each is another one on every rank."""
    model = make_model()
    params = list(model.parameters())
    closure = closure_of(model, *part(make_batch(), rank, size, uneven=True))
    tape, share = record_share(closure, params, tn.DataParallel())
    return [RegimeChoice(gradients=2.0**k, flops=0.0).price(tape, share) for k in range(16)]


def on_noise(rank: int, size: int) -> Any:
    """κ and Kronecker factors of means and of sums over the samples."""
    model = make_model()
    params, found = list(model.parameters()), []
    for reduction in ("mean", "sum"):
        closure = closure_of(model, *part(make_batch(), rank, size, uneven=True), reduction)
        tape, share = record_share(closure, params, tn.DataParallel())
        kfac = tn.KFAC()
        kfac.update(tape, share.statistics)
        found.append((share.noise_scale(tape, torch.Generator()), kfac.approximation.to_dense()))
    return found


def refusal(run: Callable[[], Any]) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def on_streams(rank: int, size: int) -> dict[str, Any]:
    """Every rank with batches of its own, more on some ranks than on others."""
    share = partial(part, rank=rank, size=size, uneven=True)
    found = {}
    for name, subset in (("newton-cg", True), ("newton-cg", False), ("cg", False), ("hessian-free", True)):
        make = partial(METHODS[name], process_group=dist.group.WORLD)
        found[name, subset] = train(make, share, subset=subset, make_closure=stream_of)
    return found


def on_streams_in_blocks(rank: int, size: int) -> Any:
    """Every rank solves for its own parameters, with batches and with one closure."""
    share = partial(part, rank=rank, size=size, uneven=True)
    make = partial(tn.DistributedNewton, process_group=dist.group.WORLD)
    return [train(make, share, subset=True, make_closure=how)[0] for how in (stream_of, closure_of)]


def on_stream_misuse(rank: int, size: int) -> Any:
    """Batches on some ranks alone, as closure and as curvature, and a batch that fails on one; then a step is made."""
    model = make_model()
    optimizer = tn.Newton(model.parameters(), process_group=dist.group.WORLD)
    x, y = part(make_batch(), rank, size)
    closure, stream, before = closure_of(model, x, y), stream_of(model, x, y), flat(model)
    some = stream if rank == 1 else closure
    messages = [refusal(lambda: optimizer.step(some)), refusal(lambda: optimizer.step(closure, curvature=some))]
    broken = tn.over([closure, closure_of(model, x[:, : 4 if rank == 1 else 5], y)])
    try:
        optimizer.step(broken)
    except RuntimeError as error:
        messages.append(str(error))
    untouched = torch.equal(flat(model), before)
    optimizer.step(tn.over([closure]), curvature=stream)
    return messages, untouched, optimizer.report.accepted


def on_stream_under_ddp(rank: int, size: int) -> Any:
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = tn.Newton(model.parameters())
    closure = closure_of(DistributedDataParallel(model), *part(make_batch(), rank, size))
    stream, before = tn.over([closure, closure]), flat(model)
    message = refusal(lambda: optimizer.step(stream))
    return message, torch.equal(before, flat(model)), int(model[0].num_batches_tracked)


def on_nan(rank: int, size: int) -> Any:
    """The last rank's sample is not a number in the second step."""
    model = make_model()
    optimizer = tn.Newton(model.parameters(), process_group=dist.group.WORLD)
    x, y = part(make_batch(), rank, size)
    optimizer.step(closure_of(model, x, y))
    before, damping = flat(model), optimizer.report.damping
    if rank == size - 1:
        x = torch.full_like(x, math.nan)
    optimizer.step(closure_of(model, x, y))
    status, accepted = optimizer.report.status, optimizer.report.accepted
    untouched = torch.equal(flat(model), before)
    optimizer.step(closure_of(model, *part(make_batch(), rank, size)))
    return untouched, accepted, status, optimizer.report.accepted, optimizer.report.damping > damping / 9


def on_failing_closure(rank: int, size: int) -> Any:
    model = make_model()
    before = flat(model)
    optimizer = tn.Newton(model.parameters(), process_group=dist.group.WORLD)
    x, y = part(make_batch(), rank, size)
    try:
        optimizer.step(closure_of(model, x[:, :4] if rank == 1 else x, y))
    except RuntimeError as error:
        message = f"{type(error).__name__}: {error}"
    optimizer.step(closure_of(model, x, y))
    return message, optimizer.report.accepted, torch.equal(before, flat(model))


def on_other_parameters(rank: int, size: int) -> Any:
    model = make_model()
    if rank == 1:
        next(model.parameters()).data[0, 0] += 1e-9
    tn.Newton(model.parameters(), process_group=dist.group.WORLD).step(closure_of(model, *make_batch()))


def on_bytes(rank: int, size: int) -> Any:
    model = make_model()
    solver = tn.CG(rtol=0.0, max_iterations=5)
    make = partial(tn.Newton, solver=solver, damping=tn.ConstantDamping(1.0), line_search=tn.FullStep())
    optimizer = make(model.parameters(), process_group=dist.group.WORLD)
    for step in range(2):
        optimizer.step(closure_of(model, *part(make_batch(step), rank, size)))
    report = optimizer.report
    return report.bytes_communicated, report.messages, report.products, report.loss_evaluations


def on_buffers(rank: int, size: int) -> Any:
    """BatchNorm under DistributedDataParallel, training and evaluation mode; an unused parameter."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3)).double()
    model.spare = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = tn.Newton(model.parameters(), solver=tn.CG(max_iterations=5))
    losses = []
    for training in (True, False):
        called.train(training)
        for _ in range(3):
            optimizer.step(closure_of(called, *part(make_batch(), rank, size)))
            losses.append(optimizer.report.loss)
    return flat(model), losses, int(model[1].num_batches_tracked)


def on_hang(rank: int, size: int) -> Any:
    """The last of this file: the group is of no use after it."""
    model = make_model()
    optimizer = tn.Newton(model.parameters(), process_group=tn.DataParallel(timeout=2.0))
    closure = closure_of(model, *part(make_batch(), rank, size))
    optimizer.step(closure)
    before, start = flat(model), time.monotonic()
    if rank == size - 1:
        time.sleep(6.0)
        return None
    try:
        optimizer.step(closure)
    except tn.RankError as error:
        return str(error), time.monotonic() - start, torch.equal(before, flat(model))
