"""Hessian-free optimization against dense linear algebra, and what negative curvature is good for."""

from __future__ import annotations

import math

import pytest
import torch
from reference import assert_close, dense_reference, flat, like
from zoo import ZOO

import torchnewton as tn


def martens_cg(A, b, x, max_iterations):
    """CG from x until the model no longer falls; the iterates 1, 2, 3, 4, 6, 8, … with their number, and the last."""
    r = b - A @ x
    p, kept, next_kept = r.clone(), [], 1
    models = [0.0]  # from the start, as the rule of the paper reads
    start = x
    for i in range(1, max_iterations + 1):
        alpha = (r @ r) / (p @ A @ p)
        x = x + alpha * p
        new = r - alpha * A @ p
        p, r = new + (new @ new) / (r @ r) * p, new
        d = x - start
        models.append(float(0.5 * d @ A @ d - (b - A @ start) @ d))
        k = max(10, math.ceil(0.1 * i))
        if i > k and models[-1] < 0 and (models[-1] - models[-1 - k]) / models[-1] < k * 5e-4:
            break
        if i == max_iterations:
            break
        if i >= next_kept:
            kept.append(x)
            next_kept = max(next_kept + 1, math.ceil(1.3 * next_kept))
    return kept, x


def by_hand(problem, steps, max_iterations):
    """Martens' loop; λ and how often an earlier iterate was taken."""
    damping, backtracked, last = 1.0, 0, None
    for _ in range(steps):
        ref = dense_reference(problem.params, problem.outputs, problem.loss)
        start, g = flat(problem.params), ref.gradient
        A = ref.gauss_newton + damping * torch.eye(len(g), dtype=g.dtype)
        warm = torch.zeros_like(g) if last is None else 0.95 * last

        def value(d, start=start):
            with torch.no_grad():
                for p, new in zip(problem.params, like(problem.params, start + d), strict=True):
                    p.copy_(new)
            return problem.closure().item()

        kept, d = martens_cg(A, -g, warm, max_iterations)
        lowest = value(d)
        for x in reversed(kept):
            if not value(x) < lowest:
                break
            backtracked += 1
            lowest, d = value(x), x
        f, alpha = value(0 * d), 1.0
        while value(alpha * d) - f > 1e-4 * alpha * float(g @ d):
            alpha /= 2
        last = alpha * d
        predicted = float(g @ last + 0.5 * last @ ref.gauss_newton @ last)
        ratio = (value(last) - f) / predicted
        damping *= 1.5 if ratio < 0.25 else 2 / 3 if ratio > 0.75 else 1.0
    return damping, backtracked


def test_the_gauss_newton_variant_is_martens_method():
    hand, ours = ZOO["mlp"](torch.float64), ZOO["mlp"](torch.float64)
    damping, backtracked = by_hand(hand, 8, 12)
    optimizer = tn.HessianFree(ours.params, curvature=tn.GaussNewton, max_iterations=12)
    for _ in range(8):
        optimizer.step(ours.closure)
    assert backtracked > 0
    assert_close(flat(ours.params), flat(hand.params), 1e-8)
    optimizer.step(ours.closure)
    assert optimizer.report.damping == pytest.approx(damping)


def saddle(theta):
    """x² − y² + y⁴/2: a saddle at 0, minima −½ at (0, ±1)."""
    x, y = theta
    return x**2 - y**2 + 0.5 * y**4


@pytest.mark.parametrize("y", [1e-3, -1e-3])
def test_negative_curvature_leads_away_from_a_saddle(y):
    theta = torch.tensor([0.5, y], dtype=torch.float64, requires_grad=True)
    optimizer = tn.HessianFree([theta], damping=1e-2)
    statuses = []
    for _ in range(30):
        optimizer.step(lambda: saddle(theta))
        statuses.append(optimizer.report.status)
    assert any("negative curvature" in status for status in statuses)
    assert float(saddle(theta).detach()) == pytest.approx(-0.5, abs=1e-6)


def test_with_positive_curvature_the_solution_is_newtons():
    p = ZOO["mlp"](torch.float64)
    start = flat(p.params)
    tape = tn.record(p.closure, p.params)
    H = tn.Hessian(tape).to_dense()
    g = flat(tape.gradient)
    damping = 1.0 - 2 * float(torch.linalg.eigvalsh(H)[0].clamp(max=0))
    solver = tn.AlongNegativeCurvature(tn.BiCGSTAB(rtol=1e-13, max_iterations=500))
    optimizer = tn.HessianFree(p.params, solver=solver, damping=damping)
    optimizer.step(p.closure)
    assert optimizer.report.step_length == 1
    d = torch.linalg.solve(H + damping * torch.eye(len(g), dtype=g.dtype), -g)
    assert_close(flat(p.params), start + d)


@pytest.mark.parametrize("seed", range(20))
def test_directions_point_downhill_and_know_their_residual(seed):
    """For random indefinite matrices: bᵀx ≥ 0, r = b − Ax, and the model is lower than at ±d."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))
    A = Q @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, -0.2, -1.0], dtype=torch.float64)) @ Q.T
    b = torch.randn(6, dtype=torch.float64, generator=generator)
    inner = tn.BiCGSTAB(rtol=1e-3, max_iterations=4)
    plain, found = inner.solve(A, [b]), tn.AlongNegativeCurvature(inner).solve(A, [b])
    (x,), (r,), (d,) = found.solution, found.residual, plain.solution
    assert float(b @ x) >= 0
    assert_close(r, b - A @ x)

    def model(v):
        return float(0.5 * v @ A @ v - b @ v)

    d = d if float(b @ d) >= 0 else -d
    assert model(x) <= model(d) + 1e-12
    took = found.status is tn.Status.NEGATIVE_CURVATURE
    assert took == (model(x) < model(d) - 1e-12)
    assert found.num_products == plain.num_products + (plain.negative_curvature is not None)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="keep=1"):
        tn.CG(keep=1.0)
    with pytest.raises(ValueError, match="decay=0"):
        tn.WarmStart(tn.CG(), decay=0.0)
