"""Exact steps that trust their batch: when they begin, when they end, and what they reach."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from torchnewton.optim.bold import Bold, BoldState

RULE = Bold(window=4, progress=0.9, patience=1, worse=2.0, share=5.0, growth=4.0)


def after(losses: list[float], state: BoldState | None = None) -> BoldState:
    state = state or RULE.begun(BoldState(), [1.0, 1.0], exact=False, damping=0.1)
    for loss in losses:
        state = RULE.seen(state, loss, work=100.0)
    return state


def test_they_begin_when_a_window_of_them_costs_a_fifth_of_the_work():
    assert not RULE.is_due(BoldState(), 59.0, 3.0, [1.0, 1.0])
    assert RULE.is_due(BoldState(), 60.0, 3.0, [1.0, 1.0])
    assert not RULE.is_due(BoldState(), 60.0, 3.0, [1.0])  # too little is known of the loss
    assert not RULE.is_due(BoldState(due=61.0), 60.0, 3.0, [1.0, 1.0])
    assert not RULE.is_due(BoldState(on=True), 60.0, 3.0, [1.0, 1.0])


def test_they_go_on_while_windows_fall():
    state = after([0.9, 0.9, 0.8, 0.8] + 4 * [0.7] + 4 * [0.6])
    assert (state.on, state.idle, state.best) == (True, 0, pytest.approx(0.6))


def test_one_window_without_progress_is_forgiven_two_are_not():
    state = after(8 * [1.5])
    assert (state.on, state.idle, state.best) == (True, 1, 1.5)
    assert after(4 * [1.3], state).idle == 0
    ended = after(4 * [1.4], state)
    assert ended == BoldState(due=400.0)


@pytest.mark.parametrize("loss", [2.1, math.inf, math.nan])
def test_they_end_at_once_where_the_loss_has_doubled(loss):
    assert after([1.0, 1.0, 1.0]).on
    assert not after([loss] * 4).on


def test_outside_them_the_last_losses_are_kept():
    assert after([1.0, 2.0, 3.0], BoldState()).losses == (2.0, 3.0)


def surface(noise: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.rand(4000, 2) * 2 - 1
    y = torch.sin(4 * x[:, :1]) * torch.cos(6 * x[:, 1:])
    return x, y + noise * torch.randn_like(y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))


def train(noise: float, steps: int, bold: Bold | None) -> tuple[float, list[bool]]:
    """The mean loss of the last 20 batches, and which steps were bold."""
    (x, y), model, generator = surface(noise), network(), torch.Generator().manual_seed(0)
    optimizer = tn.Newton(model.parameters())
    assert optimizer.choice is not None
    optimizer.choice = replace(optimizer.choice, bold=bold)
    losses, on = [], []
    for _ in range(steps):
        i = torch.randint(len(x), (200,), generator=generator)
        losses.append(float(optimizer.step(lambda i=i: F.mse_loss(model(x[i]), y[i]))))
        on.append(optimizer.state_dict()["state"][0]["bold"]["on"])
    return sum(losses[-20:]) / 20, on


def test_without_noise_they_fit_what_careful_steps_do_not():
    """Batches of 200 samples for 697 parameters."""
    careful, never = train(0.0, 430, None)
    loss, on = train(0.0, 430, Bold())
    assert not any(never)
    assert sum(on) >= 100
    assert loss < 0.2 * careful


def test_with_noise_they_are_ended_and_come_back_ever_more_rarely():
    loss, on = train(0.5, 900, Bold(share=1.0))
    starts = [k for k, (a, b) in enumerate(zip([False, *on], on, strict=False)) if b and not a]
    assert 1 <= len(starts) <= 2
    assert not on[-1]
    assert sum(on) <= 160
    assert loss < 1.5 * 0.25


def test_a_checkpoint_continues_bit_for_bit_within_them():
    x, y = surface(0.0)
    model, copy = network(), network()
    optimizer, again = tn.Newton(model.parameters()), tn.Newton(copy.parameters())
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(len(x), (200,), generator=generator) for _ in range(160)]
    for k, i in enumerate(batches):
        optimizer.step(lambda i=i: F.mse_loss(model(x[i]), y[i]))
        if optimizer.state_dict()["state"][0]["bold"]["on"] and k > 140:
            break
    copy.load_state_dict(model.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()["state"][0]["bold"]["on"]
    for i in batches[:30]:
        optimizer.step(lambda i=i: F.mse_loss(model(x[i]), y[i]))
        again.step(lambda i=i: F.mse_loss(copy(x[i]), y[i]))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copy.parameters(), strict=True))
