"""Newton-CG against the published method on dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, dense_reference, flat, like
from torch import nn
from zoo import ZOO, integers, uniform

import torchnewton as tn


def conjugate_gradients(A, b, max_iterations):
    """From 0 to ‖r‖ ≤ 0.1‖b‖; returns x and b − Ax."""
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(max_iterations):
        if r.norm() <= 0.1 * b.norm():
            break
        alpha = (r @ r) / (p @ A @ p)
        x, new = x + alpha * p, r - alpha * A @ p
        p = new + (new @ new) / (r @ r) * p
        r = new
    return x, r


def by_hand(params, all_data, blocks, weight_decay):
    """simpleNN's loop, one step for each block; all_data and blocks are (outputs, loss). Returns λ."""
    damping, w = 1.0, weight_decay
    outputs, loss = all_data
    for block in blocks:
        theta = flat(params)
        g = dense_reference(params, *all_data).gradient + w * theta
        G = dense_reference(params, *block).gauss_newton + w * torch.eye(len(g), dtype=g.dtype)
        d, r = conjugate_gradients(G + damping * torch.eye(len(g), dtype=g.dtype), -g, 250)

        def value(alpha, start=theta, d=d):
            theta = start + alpha * d
            with torch.no_grad():
                for p, new in zip(params, like(params, theta), strict=True):
                    p.copy_(new)
            return loss(*outputs()).item() + 0.5 * w * float(theta @ theta)

        f, alpha = value(0.0), 1.0
        while value(alpha) - f > 1e-4 * alpha * float(g @ d):
            alpha /= 2
        curved = float(d @ (-g - r - damping * d))
        predicted = alpha * float(g @ d) + 0.5 * alpha**2 * curved
        ratio = (value(alpha) - f) / predicted
        damping *= 1.5 if ratio < 0.25 else 2 / 3 if ratio >= 0.75 else 1.0
    return damping


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_newton_cg_is_the_published_method(weight_decay):
    hand, ours = ZOO["mlp"](torch.float64), ZOO["mlp"](torch.float64)
    everything = (hand.outputs, hand.loss)
    damping = by_hand(hand.params, everything, [everything] * 10, weight_decay)
    optimizer = tn.NewtonCG(ours.params, weight_decay=weight_decay)
    for _ in range(10):
        optimizer.step(ours.closure)
    assert_close(flat(ours.params), flat(hand.params), 1e-8)
    optimizer.step(ours.closure)
    assert optimizer.report.damping == pytest.approx(damping)


@pytest.mark.parametrize("loss", ["squared error", "cross entropy"])
def test_streamed_newton_cg_is_the_published_method(loss):
    """A convolutional network on 50 samples by 16, each G of ten of them by 4, weight decay 1/(Cl)."""
    x, y = uniform(50, 1, 6, 6).double(), integers(3, 50)

    def loss_of(z, i):
        if loss == "cross entropy":
            return F.cross_entropy(z, y[i])
        return ((z - F.one_hot(y[i], 3)) ** 2).sum() / len(i)

    def loss_of_batch(i):  # the same by a loss that is recorded
        if loss == "cross entropy":
            return F.cross_entropy(ours(x[i]), y[i])
        return F.mse_loss(ours(x[i]), F.one_hot(y[i], 3).double(), reduction="sum") / len(i)

    def part(i):
        return lambda: [hand(x[i])], lambda z: loss_of(z, i)

    torch.manual_seed(0)
    hand = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3)
    ).double()
    ours = copy.deepcopy(hand)
    weight_decay = 1 / (0.01 * len(x))
    subsets, same = tn.Subsets(len(x), 0.2), tn.Subsets(len(x), 0.2)
    blocks = [part(next(same)) for _ in range(8)]  # into the second pass over the data
    damping = by_hand(list(hand.parameters()), part(torch.arange(50)), blocks, weight_decay)
    optimizer = tn.NewtonCG(ours.parameters(), weight_decay=weight_decay)
    data = tn.over(torch.arange(50).split(16), loss_of_batch)
    for _ in range(8):
        optimizer.step(data, curvature=tn.over(next(subsets).split(4), loss_of_batch))
    assert_close(flat(ours.parameters()), flat(hand.parameters()))
    optimizer.step(data)
    assert optimizer.report.damping == pytest.approx(damping)


def test_halvings_are_bounded():
    p = ZOO["mlp"](torch.float64)
    before = flat(p.params)
    optimizer = tn.NewtonCG(p.params, max_halvings=3)
    values = iter([1.0, 1.0, *[2.0] * 10])  # recorded, repeated, then every trial is worse
    optimizer.step(lambda: p.closure() * 0 + p.closure() / p.closure().detach() * next(values))
    assert not optimizer.report.accepted
    assert optimizer.report.loss_evaluations == 4
    assert torch.equal(flat(p.params), before)
    optimizer.step(p.closure)
    assert optimizer.report.damping == 1.5
