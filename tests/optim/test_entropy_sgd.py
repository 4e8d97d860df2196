"""Entropy-SGD: Nesterov SGD without a chain, the chain's distribution on quadratics, and the optimizer contract."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from methods import differences, make_batch, make_model, snapshot
from torch import nn

import torchnewton as tn


def closure_of(model, first=0):
    """Draws the batch at each call; and the number of calls."""
    calls = [first]

    def closure():
        x, y = make_batch(calls[0])
        calls[0] += 1
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure, calls


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_without_a_chain_it_is_nesterov_sgd_bit_for_bit(momentum, weight_decay):
    ends, losses = [], []
    for method in ("ours", "torch"):
        model = make_model()
        if method == "ours":
            optimizer = tn.EntropySGD(
                model.parameters(), lr=0.1, inner_steps=0, momentum=momentum, weight_decay=weight_decay
            )
        else:
            optimizer = torch.optim.SGD(
                model.parameters(), lr=0.1, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
            )
        closure, _ = closure_of(model)
        torch.manual_seed(3)
        losses.append([optimizer.step(closure).item() for _ in range(12)])
        ends.append(snapshot(model))
    assert losses[0] == losses[1]
    assert differences(*ends) == []


def test_published_steps_by_hand():
    """Two steps on f = ½h(x − c)², written out with the velocities of both loops, without noise."""
    h, c, lr, inner, gamma0, growth, a, beta, w = 2.0, 3.0, 0.5, 0.1, 0.3, 0.5, 0.25, 0.9, 0.1
    x, outer = 1.0, 0.0
    for t in range(2):
        y, mean, v = x, x, 0.0
        gamma = gamma0 * (1 + growth) ** t
        for _ in range(3):
            g = h * (y - c) + w * y - gamma * (x - y)
            v = beta * v + g
            y -= inner * (g + beta * v)
            mean = (1 - a) * mean + a * y
        outer = beta * outer + (x - mean)
        x -= lr * ((x - mean) + beta * outer)
    theta = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = tn.EntropySGD(
        [theta],
        lr=lr,
        inner_steps=3,
        inner_lr=inner,
        scope=gamma0,
        scope_growth=growth,
        noise=0.0,
        average=a,
        momentum=beta,
        weight_decay=w,
    )
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        theta.grad = None
        loss = 0.5 * h * (theta - c) ** 2
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 4.0
    optimizer.step(closure)
    assert calls == 6
    assert theta.item() == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mean_of_the_chain_tends_to_its_closed_form(momentum):
    """On ½h(x' − c)² the samples have mean (hc + γx)/(h + γ) and, without momentum, variance η'ε²/(1 − (1 − η'k)²).

    20,000 chains at once, each an entry of one parameter; a = 1 makes μ the last sample.
    """
    n, h, c, gamma, inner, noise, start = 20_000, 2.0, 3.0, 0.5, 0.1, 0.7, -1.0
    theta = nn.Parameter(torch.full((n,), start, dtype=torch.float64))
    optimizer = tn.EntropySGD(
        [theta], lr=1.0, inner_steps=200, inner_lr=inner, scope=gamma, noise=noise, average=1.0, momentum=momentum
    )

    def closure():
        theta.grad = None
        loss = (0.5 * h * (theta - c) ** 2).sum()
        loss.backward()
        return loss

    torch.manual_seed(0)
    optimizer.step(closure)
    moved = (theta.detach() - start) / (1 + momentum)  # the outer Nesterov factor of a first step
    found = start + moved
    mean = (h * c + gamma * start) / (h + gamma)
    assert abs(found.mean().item() - mean) < 4 * found.std().item() / math.sqrt(n)
    if not momentum:
        rate = 1 - inner * (h + gamma)
        variance = inner * noise**2 / (1 - rate**2)
        assert found.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


def test_average_over_a_long_chain_has_the_same_mean():
    n, gamma = 5_000, 0.5
    theta = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = tn.EntropySGD([theta], inner_steps=150, scope=gamma, noise=1.0, average=0.25, momentum=0.0)

    def closure():
        theta.grad = None
        loss = (theta - 1.0).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = 2 / (2 + gamma)
    assert abs(theta.mean().item() - expected) < 4 * theta.std().item() / math.sqrt(n)
    rate, a = 1 - 0.1 * (2 + gamma), 0.25  # of the chain, an autoregression, and of its running average
    variance = 0.1 / (1 - rate**2) * a / (2 - a) * (1 + rate * (1 - a)) / (1 - rate * (1 - a))
    assert theta.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


def test_continues_bit_for_bit():
    whole = make_model()
    optimizer = tn.EntropySGD(whole.parameters(), inner_steps=3, noise=0.01)
    closure, calls = closure_of(whole)
    torch.manual_seed(5)
    for _ in range(3):
        optimizer.step(closure)
    saved = copy.deepcopy({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    random = torch.get_rng_state()
    first = calls[0]
    losses = [float(optimizer.step(closure)) for _ in range(3)]

    again = make_model()
    again.load_state_dict(saved["model"])
    optimizer = tn.EntropySGD(again.parameters(), inner_steps=3)
    optimizer.load_state_dict(saved["optimizer"])
    closure, _ = closure_of(again, first)
    torch.set_rng_state(random)
    assert [float(optimizer.step(closure)) for _ in range(3)] == losses
    assert differences(snapshot(again), snapshot(whole)) == []


@pytest.mark.parametrize("bad_call", [0, 2])
@pytest.mark.parametrize("how", ["nan", "raise"])
def test_failed_step_leaves_everything(bad_call, how):
    model = make_model()
    optimizer = tn.EntropySGD(model.parameters(), inner_steps=4)
    good, _ = closure_of(model)
    optimizer.step(good)
    before, state = snapshot(model), copy.deepcopy(dict(_state(optimizer)))
    calls = 0

    def bad():
        nonlocal calls
        calls += 1
        loss = good()
        if calls == bad_call + 1:
            if how == "raise":
                raise KeyError("of the user")
            next(model.parameters()).grad.fill_(math.nan)
        return loss

    if how == "raise":
        with pytest.raises(KeyError, match="of the user"):
            optimizer.step(bad)
    else:
        assert math.isfinite(optimizer.step(bad))
        assert optimizer.report.status == "rejected: the gradient is not finite"
        assert not optimizer.report.accepted
    assert calls == bad_call + 1
    assert differences(snapshot(model), before) == []
    for i, s in _state(optimizer):
        assert s["step"] == state[i]["step"]
        assert torch.equal(s["momentum"], state[i]["momentum"])
    optimizer.step(good)
    assert optimizer.report.accepted


def _state(optimizer):
    return optimizer.state_dict()["state"].items()


def test_groups_frozen_and_unused_parameters():
    a, b, frozen, unused = (nn.Parameter(torch.full((2,), v)) for v in (1.0, 2.0, 3.0, 4.0))
    frozen.requires_grad_(False)
    optimizer = tn.EntropySGD([{"params": [a, frozen, unused]}], inner_steps=2, noise=0.1, weight_decay=0.1)
    optimizer.add_param_group({"params": [b], "lr": 0.0})

    def closure():
        loss = (a * b).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(a, torch.full((2,), 1.0))
    assert [p.tolist() for p in (b, frozen, unused)] == [[2.0] * 2, [3.0] * 2, [4.0] * 2]
    assert optimizer.report.gradient_equivalents == 2


def test_learning_rate_schedulers_work():
    theta = nn.Parameter(torch.ones(1))
    optimizer = tn.EntropySGD([theta], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.2)

    def closure():
        theta.grad = None
        loss = theta.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_closure_without_backward():
    model = make_model()
    x, y = make_batch(0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"loss\.backward\(\)"):
        tn.EntropySGD(model.parameters()).step(lambda: F.cross_entropy(model(x), y))
    assert differences(snapshot(model), before) == []
    with pytest.raises(ValueError, match="closure=None"):
        tn.EntropySGD(model.parameters()).step()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("lr", -1.0), ("inner_steps", -1), ("momentum", 1.0), ("average", 1.5), ("scope", math.nan), ("noise", math.inf)],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"EntropySGD: {argument}={value}"):
        tn.EntropySGD(make_model().parameters(), **{argument: value})
