"""What the ranks do for `test_structures`: closures that use other layers or losses on other ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from data_parallel_cases import flat
from failure_cases import outcome, parallel
from torch import Tensor, nn

import torchnewton as tn
from torchnewton.distributed import record_share


def make_batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(20 + 8 * rank, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (len(x),), generator=generator)


def make_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def make_experts() -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()


def make_prelu() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.PReLU(), nn.Linear(4, 3)).double()


def no_samples(model: nn.Module, rank: int) -> Tensor:
    x, y = (t[: 0 if rank else len(t)] for t in make_batch(rank))
    return F.cross_entropy(model(x), y)


def no_negative_inputs(model: nn.Module, rank: int) -> Tensor:
    """A slope without a factor rule, whose gradient is zero on rank 0."""
    x, y = make_batch(rank)
    return F.cross_entropy(model(x if rank else x.abs()), y)


def another_loss(model: nn.Module, rank: int) -> Tensor:
    """A second loss on rank 0."""
    x, _ = make_batch(rank)
    loss = F.mse_loss(model(x), x[:, :3], reduction="sum")
    return loss if rank else loss + F.mse_loss(model(-x), x[:, 1:], reduction="sum")


def own_expert(model: nn.Module, rank: int) -> Tensor:
    x, _ = make_batch(rank)
    return F.mse_loss(model[rank](x), x[:, :3])


def other_use(model: nn.Module, rank: int) -> Tensor:
    """The bias of the last layer is used once more on rank 1, so that the layer has no factors there."""
    x, y = make_batch(rank)
    z = model(x)
    return F.cross_entropy(z * model[2].bias.exp() if rank else z, y)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int], Tensor]]] = {
    "no samples": (make_net, no_samples),
    "no negative inputs": (make_prelu, no_negative_inputs),
    "another loss": (make_net, another_loss),
    "own expert": (make_experts, own_expert),
    "other use": (make_net, other_use),
}


def on_steps(rank: int, size: int) -> dict[str, Any]:
    """On the same data, so that both regimes make some."""
    found = {}
    for name, (make, loss) in CASES.items():
        model = make()
        optimizer = tn.Newton(model.parameters(), process_group=parallel())
        closure = partial(loss, model, rank)
        steps = [(outcome(optimizer, closure), optimizer.report.regime) for _ in range(4)]
        found[name] = (steps, optimizer.report.loss, flat(model))
    return found


def on_statistics(rank: int, size: int) -> dict[str, Any]:
    """Kronecker factors and κ over all ranks, and what this rank finds by itself."""
    found = {}
    for name, (make, loss) in CASES.items():
        model = make()
        params = list(model.parameters())
        tape, share = record_share(partial(loss, model, rank), params, parallel())
        kfac, own = tn.KFAC(), tn.KFAC()
        kfac.update(tape, share.statistics)
        blocks = {block.positions: block for block in kfac.approximation.kronecker_blocks}
        if share.fraction:
            own.update(tape)
        found[name] = {
            "blocks": {key: (block.left, block.right) for key, block in blocks.items()},
            "own": own.approximation.to_dense() if share.fraction else None,
            "all": kfac.approximation.to_dense(),
            "weight": share.weight,
            "state": kfac.state_dict()["generator"],
            "noise": share.noise_scale(tape, torch.Generator()),
        }
    return found


def fisher_steps(rank: int, **how: Any) -> Tensor:
    model = make_net()
    optimizer = tn.Newton(model.parameters(), curvature=tn.EmpiricalFisher, solver=tn.CG(max_iterations=5), **how)
    for _ in range(2):
        optimizer.step(partial(no_samples, model, rank))
    return flat(model)


def on_fisher(rank: int, size: int) -> Tensor:
    return fisher_steps(rank, process_group=parallel())


def on_no_split(rank: int, size: int) -> str:
    """One rank's loss has no split."""
    model = make_net()
    x, _ = make_batch(rank)

    def closure() -> Tensor:
        z = model(x)
        return F.mse_loss(z, x[:, :3]) if rank else F.mse_loss(z, x[:, :3]) * 0 + z.square().mean()

    def update() -> None:
        tape, share = record_share(closure, list(model.parameters()), tn.DataParallel(num_samples=20.0, summed=False))
        tape.terms[0].outputs[:] = tape.terms[0].outputs if rank else []
        tn.KFAC().update(tape, share.statistics)

    try:
        update()
    except tn.RecordError as error:
        return str(error)
    return ""
