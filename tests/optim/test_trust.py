"""What a user can rely on: failures leave no trace, and a step disturbs nothing but the parameters."""

from __future__ import annotations

import copy
import gc
import math
import random
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods import (
    BACKTRACKING,
    METHODS,
    differences,
    is_more_careful,
    make_batch,
    make_closure,
    make_model,
    snapshot,
    train,
)
from torch import nn
from zoo import ZOO

import torchnewton as tn

ALL = pytest.mark.parametrize("name", METHODS)
INFINITE = math.inf


class _Infinite(torch.autograd.Function):
    """The identity, infinite in its value, its derivative or its second derivative."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return x * INFINITE if place == "loss" else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad * INFINITE if ctx.place == "gradient" else _InfiniteBackward.apply(grad)), None


class _InfiniteBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * INFINITE


class Poison(nn.Module):
    """The identity, or `_Infinite` at `place`."""

    place: str | None = None

    def forward(self, x):
        return x if self.place is None else _Infinite.apply(x, self.place)


class Sick(nn.Module):
    """The model of the task with a poison in the network and one in the loss."""

    def __init__(self):
        super().__init__()
        self.model, self.inside, self.behind = make_model(), Poison(), Poison()

    def closure(self, step):
        x, y = make_batch(step)

        def closure():
            return F.cross_entropy(self.behind(tn.outputs(self.inside(self.model(x)))), y)

        return closure


POISONED = [
    *((name, "behind", place) for name in METHODS for place in ("loss", "gradient", "curvature")),
    *((name, "inside", place) for name in METHODS for place in ("loss", "gradient")),
    *((name, "inside", "product") for name in ("newton-cg", "sgn", "sgn-momentum")),
]


@pytest.mark.parametrize(("name", "part", "place"), POISONED)
def test_step_that_is_not_finite_is_rejected_and_the_next_one_recovers(name, part, place):
    sick = Sick()
    optimizer = METHODS[name](sick.parameters())
    optimizer.step(sick.closure(0))
    before = snapshot(sick)

    getattr(sick, part).place = place
    returned = optimizer.step(sick.closure(1))
    report = optimizer.report
    assert differences(snapshot(sick), before) == []
    assert not report.accepted
    assert "not finite" in report.status
    assert (place if place in ("loss", "gradient") else "product") in report.status
    assert math.isfinite(returned) == (place != "loss")

    getattr(sick, part).place = None
    optimizer.step(sick.closure(2))
    assert optimizer.report.accepted
    assert is_more_careful(optimizer.report, report)
    assert all(value.isfinite().all() for value in snapshot(sick).values())
    assert {"model.0.weight", "model.1.running_mean", "model.4.bias"} <= set(differences(snapshot(sick), before))


def test_first_step_may_be_the_one_that_is_not_finite():
    sick = Sick()
    before = snapshot(sick)
    optimizer = tn.Newton(sick.parameters())
    sick.inside.place = "loss"
    optimizer.step(sick.closure(0))
    assert differences(snapshot(sick), before) == []
    sick.inside.place = None
    optimizer.step(sick.closure(1))
    assert optimizer.report.accepted


class Broken:
    """A solver whose directions are not finite while it is broken."""

    broken = False

    def solve(self, A, b, x0=None, preconditioner=None):
        result = tn.CG().solve(A, b, x0, preconditioner)
        bad = [torch.full_like(x, math.nan) for x in result.solution]
        return replace(result, solution=bad) if self.broken else result


def test_direction_that_is_not_finite():
    model, solver = make_model(), Broken()
    optimizer = tn.Newton(model.parameters(), solver=solver)
    train(model, optimizer, 0, 1)
    before = snapshot(model)
    solver.broken = True
    train(model, optimizer, 1, 2)
    assert differences(snapshot(model), before) == []
    assert not optimizer.report.accepted
    assert "not finite" in optimizer.report.status
    damping = optimizer.report.damping
    solver.broken = False
    train(model, optimizer, 2, 3)
    assert optimizer.report.accepted
    assert optimizer.report.damping > damping


@ALL
def test_loss_that_is_finite_nowhere_else(name):
    """Every trial gives NaN: the parameters stay, λ grows."""
    model = make_model()
    optimizer = METHODS[name](model.parameters())
    train(model, optimizer, 0, 1)
    start = model[0].weight.detach().clone()
    params = [p.detach().clone() for p in model.parameters()]
    x, y = make_batch(1)

    def closure():
        loss = F.cross_entropy(model(x), y)
        return loss if torch.equal(model[0].weight, start) else loss * math.nan

    optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), params, strict=True))
    assert not optimizer.report.accepted
    assert optimizer.report.status
    report = optimizer.report
    train(model, optimizer, 2, 3)
    assert optimizer.report.accepted
    assert is_more_careful(optimizer.report, report)


@ALL
def test_losses_fall(name):
    model = make_model()
    model[3].p = 0.0  # on sixteen samples, the noise of the dropout masks is as large as the loss
    optimizer = METHODS[name](model.parameters())
    losses = [float(optimizer.step(make_closure(model, 0))) for _ in range(25)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # of kl_div
@pytest.mark.parametrize("name", ZOO)
def test_default_newton_reduces_every_loss_of_the_zoo(name):
    """In float32, where most training happens."""
    p = ZOO[name](torch.float32)
    optimizer = tn.Newton(p.params)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)
        optimizer.step(p.closure)
        losses.append(optimizer.report.loss)
    assert losses[-1] < losses[0]


@ALL
def test_buffers_move_as_in_one_forward_pass(name):
    model = make_model()
    optimizer = METHODS[name](model.parameters())
    for step in range(4):
        twin = copy.deepcopy(model)
        torch.manual_seed(step)
        twin(make_batch(step)[0])
        torch.manual_seed(step)
        train(model, optimizer, step, step + 1)
        assert differences(dict(model.named_buffers()), dict(twin.named_buffers())) == []
    assert model[1].num_batches_tracked == 4


def test_line_search_evaluates_the_loss_several_times():
    """So that the tests around this one test something."""
    model = make_model()
    optimizer = METHODS["newton-backtracking"](model.parameters())
    train(model, optimizer, 0, 1)
    assert optimizer.report.loss_evaluations >= 3
    assert 0 < optimizer.report.step_length < 1


@ALL
def test_random_numbers_repeat_inside_a_step(name):
    model = make_model()
    optimizer = METHODS[name](model.parameters())
    draws = []

    def closure():
        draws.append((F.dropout(torch.ones(50), 0.5).tolist(), random.random(), np.random.rand()))
        return make_closure(model, 0)()

    seen = []
    for _ in range(3):
        draws.clear()
        optimizer.step(closure)
        assert len(draws) >= 2
        assert all(draw == draws[0] for draw in draws)
        seen.append(draws[0])
    assert seen[0] != seen[1] != seen[2]


@ALL
def test_random_streams_advance_as_in_one_evaluation(name):
    model = make_model()
    optimizer = METHODS[name](model.parameters())

    def closure():
        noise = random.random() + np.random.rand()
        return make_closure(model, 0)() + 0.0 * noise

    def streams(run):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        run()
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    for _ in range(2):
        assert streams(lambda: optimizer.step(closure)) == streams(closure)


@ALL
def test_step_returns_the_loss_before_it(name):
    model = make_model()
    optimizer = METHODS[name](model.parameters())
    for step in range(3):
        torch.manual_seed(step)
        expected = make_closure(copy.deepcopy(model), step)()
        torch.manual_seed(step)
        returned = optimizer.step(make_closure(model, step))
        assert torch.equal(returned, expected.detach())
        assert not returned.requires_grad
        assert optimizer.report.loss == returned.item()


@ALL
def test_same_seed_gives_the_same_run(name):
    runs = []
    for _ in range(2):
        model = make_model()
        train(model, METHODS[name](model.parameters()), 0, 6)
        runs.append(snapshot(model))
    assert differences(*runs) == []


@ALL
@pytest.mark.parametrize("backward", [True, False])
def test_grad_requires_grad_and_modes_after_a_step(name, backward):
    """`p.grad` is what one run of the closure leaves; everything else is as it was."""
    model = make_model()
    model[0].bias.requires_grad_(False)
    model[2].eval()
    twin = copy.deepcopy(model)
    optimizer = METHODS[name](model.parameters())
    x, y = make_batch(0)

    def closure_of(net):
        return make_closure(net, 0) if backward else lambda: F.cross_entropy(net(x), y)

    torch.manual_seed(0)
    closure_of(twin)()
    torch.manual_seed(0)
    optimizer.step(closure_of(model))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-7)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert torch.equal(model[0].bias, twin[0].bias)


@ALL
def test_no_graph_is_alive_after_a_step(name):
    """Without the help of the garbage collector: on a GPU, cycles are memory that comes back too late."""
    model = make_model()
    optimizer = METHODS[name](model.parameters())
    activations = []
    model[2].register_forward_hook(lambda module, args, output: activations.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        kept = [optimizer.step(make_closure(model, step)) for step in range(2)]
        assert len(activations) > len(kept)
        assert [ref() for ref in activations if ref() is not None] == []
    finally:
        gc.enable()


def test_exception_in_the_closure_leaves_no_trace():
    """From whichever of its runs within a step on the closure fails."""

    class MyError(Exception):
        pass

    def attempt(fail_at):
        model = make_model()
        model[0].bias.requires_grad_(False)
        optimizer = METHODS["newton-backtracking"](model.parameters())
        train(model, optimizer, 0, 1)
        before = (
            snapshot(model),
            [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()],
        )
        x, y = make_batch(1)
        calls = 0

        def closure():
            nonlocal calls
            calls += 1
            z = model(x)
            if fail_at is not None and calls >= fail_at:
                raise MyError
            return F.cross_entropy(z, y)

        if fail_at is None:
            optimizer.step(closure)
            return calls
        with pytest.raises(MyError):
            optimizer.step(closure)
        assert differences(snapshot(model), before[0]) == []
        assert [p.requires_grad for p in model.parameters()] == before[1]
        assert [m.training for m in model.modules()] == before[2]
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight])
        assert slope.isfinite().all()
        train(model, optimizer, 1, 2)
        assert optimizer.report.accepted
        return calls

    runs = attempt(None)
    assert runs >= 3
    for first in range(1, runs + 1):
        assert attempt(first) >= first


def test_step_inside_no_grad_is_the_same_step():
    results = []
    for context in (torch.no_grad, torch.enable_grad):
        model = make_model()
        optimizer = tn.Newton(model.parameters(), line_search=BACKTRACKING)
        with context():
            train(model, optimizer, 0, 3)
        results.append(snapshot(model))
    assert differences(*results) == []


def test_closure_may_switch_gradients_on_itself():
    results = []
    for wrap in (torch.enable_grad(), lambda closure: closure):
        model = make_model()
        tn.Newton(model.parameters(), line_search=BACKTRACKING).step(wrap(make_closure(model, 0)))
        results.append(snapshot(model))
    assert differences(*results) == []


@ALL
def test_step_without_a_closure(name):
    with pytest.raises(ValueError, match="closure"):
        METHODS[name](make_model().parameters()).step()


def test_closure_that_draws_a_new_batch_in_every_run():
    model = make_model()
    before = snapshot(model)
    steps = iter(range(100))
    with pytest.raises(tn.RecordError, match="draw the batch before step"):
        tn.Newton(model.parameters()).step(lambda: make_closure(model, next(steps))())
    assert differences(snapshot(model), before) == []


def test_loss_without_a_split():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(tn.RecordError, match=r"tn\.outputs"):
        tn.Newton(model.parameters()).step(lambda: model(make_batch(0)[0]).abs().sum())
    assert differences(snapshot(model), before) == []


def test_penalty_by_hand_warns_once():
    model = make_model()
    optimizer = tn.Newton(model.parameters())
    x, y = make_batch(0)

    def closure():
        return F.cross_entropy(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())

    with pytest.warns(UserWarning, match=r"weight_decay=.*tn\.outputs"):
        optimizer.step(closure)
    optimizer.step(closure)
    optimizer.step(closure)


@pytest.mark.parametrize(
    ("arguments", "word"), [({"weight_decay": -1.0}, "weight_decay=-1"), ({"momentum": 1.0}, "momentum=1")]
)
def test_bad_arguments(arguments, word):
    for method in (tn.Newton, tn.SGN):
        with pytest.raises(ValueError, match=word):
            method(make_model().parameters(), **arguments)
