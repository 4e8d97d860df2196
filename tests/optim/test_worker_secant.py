"""WorkerSecant: quadratics in one round, the step by dense algebra, ranks against one process, guards, the contract."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import differences, snapshot
from reference import assert_close, flat
from secant_process import FORMS, ROUNDS, SETTINGS, closure_of, make_model
from torch import nn

import torchnewton as tn
from torchnewton.optim.secant import SecantSolve, Slice

PROCESS = Path(__file__).with_name("secant_process.py")
EACH_FORM = pytest.mark.parametrize("form", FORMS)


def turns(optimizer, model, size, nan_at=()):
    """A closure for `step`: worker after worker, each `local_steps` + 1 calls, fewer for one that fails."""
    calls, per_round = [0] * size, optimizer.local_steps + 1
    where = {"worker": 0, "call": 0}

    def closure():
        worker = where["worker"]
        k = calls[worker]
        loss = closure_of(model, worker, calls, nan_at=dict(nan_at).get(worker))()
        where["call"] += 1
        if where["call"] == per_round or (worker, k) in nan_at:
            where["worker"], where["call"] = (worker + 1) % size, 0
        return loss

    return closure


def quadratic(n, seed=0, noise=1.0, local_steps=2):
    """½θᵀHθ − bᵀθ; local steps see other b, the gradient at their end the true one."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    H, b = A @ A.T / n + torch.eye(n).double(), torch.randn(n, generator=generator, dtype=torch.float64)
    theta, calls = nn.Parameter(torch.zeros(n, dtype=torch.float64)), [0]

    def closure():
        theta.grad = None
        calls[0] += 1
        last = calls[0] % (local_steps + 1) == 0
        shift = 0.0 if last else noise * torch.randn(n, generator=generator, dtype=torch.float64)
        loss = 0.5 * theta @ H @ theta - (b + shift) @ theta
        loss.backward()
        return loss

    return theta, closure, torch.linalg.solve(H, b)


@EACH_FORM
@given(n=st.integers(1, 6), more=st.integers(1, 4), seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_quadratic_ends_at_the_minimum_in_one_round(form, n, more, seed):
    theta, closure, minimum = quadratic(n, seed)
    optimizer = tn.WorkerSecant([theta], local_steps=2, num_workers=n + more, form=form, descent=False)
    optimizer.step(closure)
    assert_close(theta.detach(), minimum, 1e-6)
    assert optimizer.report.inner_iterations == n


@EACH_FORM
def test_earlier_rounds_raise_the_rank(form):
    """Six dimensions, three workers: two differences a round; with two earlier rounds there are more than six."""
    ranks, errors = [], []
    theta, closure, minimum = quadratic(6)
    optimizer = tn.WorkerSecant([theta], local_steps=2, num_workers=3, form=form, past_rounds=2, descent=False)
    for _ in range(3):
        optimizer.step(closure)
        ranks.append(optimizer.report.inner_iterations)
        errors.append(float((theta.detach() - minimum).norm()))
    assert ranks == [2, 5, 6]
    assert errors[2] < 1e-8 < errors[1]


@EACH_FORM
@pytest.mark.parametrize("descent", [True, False])
def test_one_round_by_dense_algebra(form, descent):
    """Local SGD in a copy of the model, S and Y as matrices, pinv, no slices."""
    size, model, points, gradients = 4, make_model(), [], []
    calls, w = [0] * size, SETTINGS["weight_decay"]
    for worker in range(size):
        local = make_model()
        closure = closure_of(local, worker, calls)
        sgd = torch.optim.SGD(local.parameters(), lr=SETTINGS["lr"], weight_decay=w)
        for _ in range(SETTINGS["local_steps"]):
            sgd.step(closure)
        closure()
        points.append(flat(local.parameters()).detach())
        gradients.append(torch.cat([p.grad.flatten() for p in local.parameters()]) + w * points[-1])
    P, G = torch.stack(points), torch.stack(gradients)
    S, Y, g = (P - P.mean(0)).T, (G - G.mean(0)).T, G.mean(0)
    if descent:
        kept = (S * Y).sum(0) > 0
        S, Y = S[:, kept], Y[:, kept]
    assert S.shape[1] > 1
    if form == "multi-secant":
        c = torch.linalg.pinv(Y, rtol=1e-6) @ g
    else:
        d = (S * Y).sum(0).abs().sqrt()
        values, V = torch.linalg.eigh((S.T @ Y + Y.T @ S) / (2 * torch.outer(d, d)))
        large = (values if descent else values.abs()) > 1e-12
        c = (V[:, large] @ ((V[:, large].T @ (S.T @ g / d)) / values[large])) / d
    step = -S @ c - SETTINGS["rest_lr"] * (g - Y @ c)
    if descent and step @ g > 0:
        step = -SETTINGS["rest_lr"] * g
    optimizer = tn.WorkerSecant(model.parameters(), num_workers=size, form=form, descent=descent, **SETTINGS)
    optimizer.step(turns(optimizer, model, size))
    assert_close(flat(model.parameters()), P.mean(0) + step, 1e-8)
    assert ("uphill" in optimizer.report.status) == (descent and form == "multi-secant")


def run_ranks(folder, size):
    command = [sys.executable, "-W", "error", str(PROCESS)]
    started = [
        subprocess.Popen([*command, str(rank), str(size), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def test_three_ranks_are_three_workers_on_one_process(tmp_path):
    """Worker 1 sends NaN in its second round; parameters, averaged buffers, losses, messages and bytes are the same."""
    ranks = run_ranks(tmp_path, 3)
    for form in FORMS:
        compare_with_one_process(ranks, form)
    assert ranks[0]["error"].startswith("num_workers=4 is not the size 3 of process_group")


def compare_with_one_process(ranks, form):
    size, model = len(ranks), make_model()
    optimizer = tn.WorkerSecant(model.parameters(), num_workers=size, form=form, **SETTINGS)
    closure = turns(optimizer, model, size, nan_at={(1, 4)})
    reports = []
    for _ in range(ROUNDS):
        loss = optimizer.step(closure)
        reports.append((float(loss), optimizer.report.status, optimizer.report.bytes_communicated))
    assert "worker 1 was dropped: the loss is not finite" in reports[1][1]
    assert "dropped" not in reports[2][1]
    for rank in range(size):
        found = ranks[rank][form]
        assert found["model"].keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                assert_close(found["model"][name], value, 1e-12)
        assert [(s, b) for _, s, b in found["reports"]] == [(s, b) for _, s, b in reports]
        assert [x for x, _, _ in found["reports"]] == pytest.approx([x for x, _, _ in reports], rel=1e-12)


def test_too_few_workers():
    for number in (0, 1):
        with pytest.raises(ValueError, match=f"num_workers={number} must be at least 2"):
            tn.WorkerSecant(make_model().parameters(), num_workers=number)
    with pytest.raises(ValueError, match="give num_workers=m"):
        tn.WorkerSecant(make_model().parameters())


def test_continues_bit_for_bit():
    size, model = 3, make_model()
    optimizer = tn.WorkerSecant(model.parameters(), num_workers=size, **SETTINGS)
    closure = turns(optimizer, model, size)
    for _ in range(2):
        optimizer.step(closure)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = [float(optimizer.step(closure)) for _ in range(2)]
    again = make_model()
    again.load_state_dict(saved[0])
    resumed = tn.WorkerSecant(again.parameters(), num_workers=size, **SETTINGS)
    resumed.load_state_dict(saved[1])
    # the closure's batches continue where they were: two rounds before
    calls = [2 * (optimizer.local_steps + 1)] * size
    where = [0]

    def continued():
        worker = where[0] // (optimizer.local_steps + 1) % size
        where[0] += 1
        return closure_of(again, worker, calls)()

    assert [float(resumed.step(continued)) for _ in range(2)] == losses
    assert differences(snapshot(again), snapshot(model)) == []


def rounds(optimizer, model, count, seed=0):
    """Some steps on batches that belong to their number."""
    generator = torch.Generator().manual_seed(seed)

    def closure():
        for p in model.parameters():
            p.grad = None
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        loss = F.mse_loss(model(x), x[:, :3])
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)


def test_earlier_rounds_of_other_parameters_are_forgotten():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = tn.WorkerSecant(model.parameters(), num_workers=2, past_rounds=2)
    rounds(optimizer, model, 3)
    assert "of 6 differences" in optimizer.report.status
    model[0].requires_grad_(False)
    rounds(optimizer, model, 1)
    assert optimizer.report.accepted
    assert "of 2 differences" in optimizer.report.status
    rounds(optimizer, model, 1)
    assert "of 4 differences" in optimizer.report.status


class Mixed(nn.Module):
    """A layer in single precision before one in double."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.float())).double())


def test_earlier_rounds_keep_their_precision():
    model = Mixed()
    optimizer = tn.WorkerSecant(model.parameters(), num_workers=2, past_rounds=2)
    rounds(optimizer, model, 3)
    other = Mixed()
    other.load_state_dict(model.state_dict())
    resumed = tn.WorkerSecant(other.parameters(), num_workers=2, past_rounds=2)
    resumed.load_state_dict(optimizer.state_dict())
    rounds(optimizer, model, 1, seed=1)
    rounds(resumed, other, 1, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("how", ["nan", "raise"])
def test_failed_round_leaves_everything(how):
    size, model = 3, make_model()
    optimizer = tn.WorkerSecant(model.parameters(), num_workers=size, **SETTINGS)
    good = turns(optimizer, model, size)
    optimizer.step(good)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    calls = [0]

    def bad():
        calls[0] += 1
        loss = closure_of(model, 0, [0])()
        if how == "raise" and calls[0] == 5:
            raise KeyError("of the user")
        return loss * math.nan if how == "nan" else loss

    if how == "raise":
        with pytest.raises(KeyError, match="of the user"):
            optimizer.step(bad)
    else:
        optimizer.step(bad)
        assert optimizer.report.status.startswith("rejected: no worker is left; worker 0 was dropped: the loss")
        assert not optimizer.report.accepted
    assert differences(snapshot(model), before) == []
    assert str(optimizer.state_dict()) == str(state)
    optimizer.step(good)
    assert optimizer.report.accepted


def test_groups_frozen_and_unused_parameters():
    a, b, frozen, unused = (nn.Parameter(torch.full((2,), v)) for v in (1.0, 2.0, 3.0, 4.0))
    frozen.requires_grad_(False)
    optimizer = tn.WorkerSecant([{"params": [a, frozen, unused]}], num_workers=3, lr=0.1)
    optimizer.add_param_group({"params": [b], "lr": 0.0})
    x = torch.randn(20, 2)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(x[torch.randint(20, (5,))] @ (a * b), torch.ones(5))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(a, torch.full((2,), 1.0))
    assert [p.tolist() for p in (frozen, unused)] == [[3.0] * 2, [4.0] * 2]
    assert optimizer.report.gradient_equivalents == 6


def gram_of(S, Y, g, rate=0.1):
    k = S.shape[0]
    part = Slice(S, Y, torch.zeros_like(g), g, torch.full_like(g, rate))
    return part, part.gram(), k


@EACH_FORM
@given(seed=st.integers(0, 10_000), k=st.integers(1, 5), n=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_step_points_downhill_and_is_no_longer_than_allowed(form, seed, k, n):
    """For any differences, consistent with a Hessian or not."""
    generator = torch.Generator().manual_seed(seed)
    S, Y = (torch.randn(k, n, generator=generator, dtype=torch.float64) for _ in range(2))
    g = torch.randn(n, generator=generator, dtype=torch.float64)
    part, gram, _ = gram_of(S, Y, g)
    found = SecantSolve(form, True, None, 0.0, 2.0)(gram, k, torch.float64)
    moved = part.moved(found)
    assert float(moved @ g) < 0
    secant = found.scale * (found.coefficients @ S)
    assert secant.norm() <= 2.0 * S.norm(dim=1).max() * (1 + 1e-9)


def test_near_dependent_differences_are_cut_off():
    """Two that are almost the same: with the cut-off one, without it two and a huge step."""
    S = torch.tensor([[1.0, 0.0], [1.0, 1e-6]], dtype=torch.float64)
    Y = torch.tensor([[1.0, 0.0], [1.0, 1e-7]], dtype=torch.float64)
    g = torch.tensor([1.0, 1.0], dtype=torch.float64)
    ranks, lengths = [], []
    for cutoff in (1e-12, 0.0):
        part, gram, k = gram_of(S, Y, g)
        found = SecantSolve("multi-secant", False, cutoff, 0.0, math.inf)(gram, k, torch.float64)
        lengths.append(float(part.moved(found).norm()))
        ranks.append(found.rank)
    assert ranks == [1, 2]
    assert lengths == pytest.approx([1.005, 10.06], rel=1e-3)


def test_damping_shortens_the_step():
    theta, closure, minimum = quadratic(3)
    distances = []
    for damping in (0.0, 1.0):
        with torch.no_grad():
            theta.zero_()
        optimizer = tn.WorkerSecant([theta], local_steps=2, num_workers=5, damping=damping, rest_lr=0.0)
        optimizer.step(closure)
        distances.append(float((theta.detach() - minimum).norm()))
    assert distances[0] < 1e-8 < distances[1]


def test_misuse_is_named():
    params = list(make_model().parameters())
    for argument, value in (("lr", -1.0), ("local_steps", 0), ("past_rounds", -1), ("cutoff", 1.0), ("radius", 0.0)):
        with pytest.raises(ValueError, match=f"WorkerSecant: {argument}={value}"):
            tn.WorkerSecant(params, num_workers=2, **{argument: value})
    with pytest.raises(ValueError, match="form='bfgs' must be one of multi-secant, symmetric"):
        tn.WorkerSecant(params, num_workers=2, form="bfgs")
    optimizer = tn.WorkerSecant(params, num_workers=2)
    with pytest.raises(ValueError, match="closure=None"):
        optimizer.step()
    with pytest.raises(ValueError, match="backward"):
        optimizer.step(lambda: params[0].sum())
