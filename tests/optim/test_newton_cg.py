"""Newton-CG against the published method on dense matrices."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close, dense_reference, flat, like
from zoo import ZOO

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


def by_hand(problem, steps, weight_decay):
    """simpleNN's loop; returns λ."""
    damping, w = 1.0, weight_decay
    for _ in range(steps):
        ref = dense_reference(problem.params, problem.outputs, problem.loss)
        start = flat(problem.params)
        g = ref.gradient + w * start
        G = ref.gauss_newton + w * torch.eye(len(g), dtype=g.dtype)
        d, r = conjugate_gradients(G + damping * torch.eye(len(g), dtype=g.dtype), -g, 250)

        def value(alpha, start=start, d=d):
            theta = start + alpha * d
            with torch.no_grad():
                for p, new in zip(problem.params, like(problem.params, theta), strict=True):
                    p.copy_(new)
            return problem.closure().item() + 0.5 * w * float(theta @ theta)

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
    damping = by_hand(hand, 10, weight_decay)
    optimizer = tn.NewtonCG(ours.params, weight_decay=weight_decay)
    for _ in range(10):
        optimizer.step(ours.closure)
    assert_close(flat(ours.params), flat(hand.params), 1e-8)
    optimizer.step(ours.closure)
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
