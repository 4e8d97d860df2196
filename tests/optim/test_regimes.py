"""Newton without arguments: which of its two regimes it takes, and when it changes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchnewton as tn
from torchnewton.optim.regime import RegimeChoice, RegimeState


def run(model, batches):
    optimizer, reports = tn.Newton(model.parameters()), []
    for x, y in batches:
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))
        reports.append(optimizer.report)
    return optimizer, reports


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def noise(count):
    """Nothing to learn."""
    torch.manual_seed(1)
    return [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(count)]


def noise_free(count):
    """Every batch says the same, and it can be fitted."""
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)
    return [(x, teacher(x)) for x in torch.randn(count, 256, 3)]


def test_on_the_same_data_it_is_exact_from_the_second_step():
    x = torch.randn(64, 3)
    _, reports = run(small(), [(x, torch.sin(x.sum(1, keepdim=True)))] * 30)
    assert [r.regime for r in reports] == ["plane"] + 29 * ["exact"]
    assert reports[-1].loss < 1e-4 * reports[0].loss


@pytest.mark.parametrize("line_search", [None, tn.Armijo(), tn.Armijo(contraction=0.4)])
def test_on_the_same_data_steps_that_go_too_far_are_solved_again_and_not_shortened(line_search):
    """Unless the line search has been given: it does what it was asked for."""
    torch.manual_seed(3)
    model, x = (
        nn.Sequential(nn.Linear(1, 20), nn.Sigmoid(), nn.Linear(20, 1)).double(),
        torch.linspace(-1, 1, 50)[:, None],
    )
    y = torch.sinc(10 * x)
    optimizer, lengths, evaluations, losses = tn.Newton(model.parameters(), line_search=line_search), [], [], []
    for _ in range(60):
        optimizer.step(lambda: F.mse_loss(model(x.double()), y.double()))
        report = optimizer.report
        if report.regime == "exact" and report.accepted:
            lengths.append(report.step_length)
            evaluations.append(report.loss_evaluations)
            losses.append(report.loss)
    assert all(b < a for a, b in pairwise(losses))
    assert max(evaluations) > 3  # acceleration and full step are three: some went too far
    assert (min(lengths) == 1) == (line_search in (None, tn.Armijo()))


def test_a_trial_on_noise_is_taken_back():
    model, batches = small(), noise(61)
    optimizer, reports = run(model, batches[:39])
    assert {r.regime for r in reports} <= {"plane", ""}  # nothing where gliding steps were taken back
    trial, back = [], None
    for x, y in batches[39:]:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))
        if optimizer.report.regime == "exact":
            trial.append(before)
        elif trial:
            back = optimizer.report
            break
    assert 1 <= len(trial) <= 20
    assert "taken back" in back.status
    assert not back.accepted
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trial[0], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_trial_without_noise_is_passed():
    optimizer, reports = run(small(), noise_free(70))
    regimes = [r.regime for r in reports]
    change = regimes.index("exact")
    assert 40 <= change <= 60  # gliding steps are ended first
    assert set(regimes[change:]) == {"exact"}
    assert reports[-1].loss < 5e-2 * reports[change].loss
    assert optimizer.state_dict()["state"][0]["regime"]["trial"] == 0


def test_where_factorizations_are_dear_it_stays_in_the_plane():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 40))
    x, y = torch.randn(256, 100), torch.randint(40, (256,))
    optimizer, reports = tn.Newton(model.parameters()), []
    for _ in range(25):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        reports.append(optimizer.report)
    assert {r.regime for r in reports} == {"plane"}
    assert reports[5].solver == "plane of 2 directions"
    assert reports[-1].loss < 0.1 * reports[0].loss


def test_on_the_same_data_exact_steps_may_cost_more():
    """A pendulum, its equation written by hand; the two initial values are outputs without samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    t = torch.linspace(0, 2, 60, dtype=torch.float64)[:, None].requires_grad_()
    optimizer = tn.Newton(model.parameters())
    assert optimizer.choice is not None
    optimizer.choice = replace(optimizer.choice, gradients=0.0, flops=1e7)  # dear, but not beyond patience

    def closure():
        optimizer.zero_grad()
        u = model(t)
        (velocity,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (force,) = torch.autograd.grad(velocity.sum(), t, create_graph=True)
        loss = ((force + torch.sin(u)) ** 2).mean() + (u[0, 0] - 1) ** 2 + velocity[0, 0] ** 2
        loss.backward()
        return loss

    for step in range(60):
        loss = optimizer.step(closure)
        assert optimizer.report.regime == ("exact" if step else "plane")
    assert loss < 1e-9
    dear = tn.Newton(model.parameters())
    dear.choice = replace(optimizer.choice, patience=1.0)
    for _ in range(3):
        dear.step(closure)
    assert dear.report.regime == "plane"


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_factor_on_the_loss_changes_nothing_in_the_plane(factor):
    plane = tn.LevenbergMarquardt(initial=1.0, minimum=1e-3, unit=tn.Unit.NOISE)

    def final(c):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).double()
        optimizer = tn.Newton(model.parameters(), solver=tn.Plane(), preconditioner=tn.KFAC(), damping=plane)
        for _ in range(12):
            x = torch.randn(50, 6, dtype=torch.float64)
            y = x.argmax(1) % 5
            optimizer.step(lambda x=x, y=y: c * F.cross_entropy(model(x), y))
        return tn.record(lambda: F.cross_entropy(model(x), y), list(model.parameters())).loss

    assert float(final(factor)) == pytest.approx(float(final(1.0)), rel=1e-5)


def test_arguments_leave_no_choice():
    for arguments in ({"solver": tn.CG()}, {"damping": tn.ConstantDamping(0.1)}, {"curvature": tn.Hessian}):
        assert tn.Newton(small().parameters(), **arguments).choice is None


def test_evidence_is_a_sum_of_bounded_ratios_above_what_is_expected():
    choice, state = RegimeChoice(), RegimeState(exact=True, trial=20)
    assert choice.judged(state, 0.3).evidence == pytest.approx(0.15)
    assert choice.judged(state, -50.0).evidence == pytest.approx(-0.25)
    assert choice.judged(choice.judged(state, 9.0), 9.0).evidence == 1.0
    assert choice.judged(state, float("nan")) == state
    assert choice.judged(RegimeState(exact=True), 0.3).evidence == pytest.approx(0.225)


def test_trials_come_ever_more_rarely():
    choice = RegimeChoice()
    state = RegimeState(exact=False, price=5.0, next_trial=40)
    assert choice.next(state, 39, False) == (state, False)
    trial, failed = choice.next(state, 40, False)
    assert (trial.exact, trial.trial, trial.next_trial, failed) == (True, 20, 800, False)
    ended, failed = choice.next(choice.judged(choice.judged(trial, -1.0), -1.0), 42, False)
    assert (ended.exact, failed) == (False, True)
    dear = RegimeState(exact=False, next_trial=40)
    assert choice.next(dear, 40, True) == (dear, False)


@pytest.mark.parametrize("before", [6, 54])
def test_a_checkpoint_continues_bit_for_bit_also_within_a_trial(before):
    batches = noise_free(before + 4)
    model = small()
    optimizer, reports = run(model, batches[:before])
    assert reports[-1].regime == ("plane" if before == 6 else "exact")
    copy = small()
    copy.load_state_dict(model.state_dict())
    again = tn.Newton(copy.parameters())
    again.load_state_dict(optimizer.state_dict())
    for x, y in batches[before:]:
        optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))
        again.step(lambda x=x, y=y: F.mse_loss(copy(x), y))
        assert again.report.regime == optimizer.report.regime
        assert again.report.damping == optimizer.report.damping
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copy.parameters(), strict=True))
