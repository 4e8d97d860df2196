"""A closure that cannot be recorded says why, and names the way out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import integers, uniform

import torchnewton as tn

X, Y = uniform(4, 3), integers(3, 4)


def linear() -> nn.Module:
    return nn.Linear(3, 3)


def hand_written(model: nn.Module) -> torch.Tensor:
    return model(X).abs().sum()


def log_probabilities_without_softmax(model: nn.Module) -> torch.Tensor:
    return F.nll_loss(model(X), Y)


def unreduced(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(X), Y, reduction="none")


def nothing(model: nn.Module) -> None:
    F.cross_entropy(model(X), Y)


def number(model: nn.Module) -> float:
    return F.cross_entropy(model(X), Y).item()


def detached(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(X), Y).detach()


def unreduced_backward(model: nn.Module) -> torch.Tensor:
    loss = F.cross_entropy(model(X), Y, reduction="none")
    loss.backward()
    return loss


def scaled(model: nn.Module) -> torch.Tensor:
    loss = F.cross_entropy(model(X), Y)
    torch.amp.GradScaler("cpu").scale(loss).backward()
    return loss


def embedded(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(Y), Y)


def reentrant(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(checkpoint(model, X.clone().requires_grad_(), use_reentrant=True), Y)


def reentrant_backward(model: nn.Module) -> torch.Tensor:
    loss = reentrant(model)
    loss.backward()
    return loss


class Once(torch.autograd.Function):
    """An operation whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


def differentiable_once(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(Once.apply(model(X)), Y)


def bag(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(Y[:, None]), Y)


@pytest.mark.parametrize(
    ("make", "loss", "words"),
    [
        (linear, hand_written, [r"tn\.outputs", "cross_entropy", "mse_loss"]),
        (linear, log_probabilities_without_softmax, [r"tn\.outputs", "log_softmax"]),
        (linear, unreduced, ["scalar", "shape"]),
        (linear, nothing, ["NoneType", "return the scalar loss"]),
        (linear, number, ["float", r"not loss\.item\(\)"]),
        (linear, detached, ["does not depend on any parameter"]),
        (linear, unreduced_backward, ["shape", "scalar"]),
        (linear, scaled, ["GradScaler", "bfloat16"]),
        (lambda: nn.Embedding(3, 3, sparse=True), embedded, ["sparse=False"]),
        (lambda: nn.EmbeddingBag(3, 3, sparse=True, mode="sum"), bag, ["sparse=False"]),
        (
            lambda: nn.EmbeddingBag(3, 3),
            bag,
            ["cannot be differentiated twice", "EmbeddingBag|embedding_bag"],
        ),
        (linear, reentrant, ["use_reentrant=False"]),
        (linear, reentrant_backward, ["use_reentrant=False"]),
        (linear, differentiable_once, ["cannot be differentiated twice"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_message_names_the_way_out(make, loss, words):
    model = make()
    size = sum(p.numel() for p in model.parameters())
    with pytest.raises(tn.RecordError) as caught:
        tn.GaussNewton(tn.record(lambda: loss(model), model.parameters())) @ torch.ones(size)
    for word in words:
        assert caught.match(word)


def test_record_error_is_a_runtime_error():
    assert issubclass(tn.RecordError, RuntimeError)


def test_disabled_grad_scaler_is_fine():
    model = linear()

    def closure():
        loss = F.cross_entropy(model(X), Y)
        torch.amp.GradScaler("cpu", enabled=False).scale(loss).backward()
        return loss

    assert len(tn.record(closure, model.parameters()).pieces) == 1


def test_fully_sharded_modules(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(linear(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(tn.RecordError, match="DistributedDataParallel"):
            tn.record(lambda: F.cross_entropy(model(X), Y), model.parameters())
    finally:
        dist.destroy_process_group()


def test_error_of_the_closure_passes_and_buffers_are_put_back():
    model = nn.BatchNorm1d(3)

    def closure():
        model(X)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tn.record(closure, model.parameters())
    assert model.num_batches_tracked == 0
    assert torch.equal(model.running_mean, torch.zeros(3))
    loss = F.cross_entropy(model(X), Y)
    loss.backward()
    assert model.weight.grad is not None
