"""Newton without arguments: which of its two regimes it takes, and when it changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchnewton as tn
from torchnewton.optim.regime import RegimeChoice


def run(model, batches, make=tn.Newton):
    optimizer, regimes, losses = make(model.parameters()), [], []
    for x, y in batches:
        losses.append(float(optimizer.step(lambda x=x, y=y: F.mse_loss(model(x), y))))
        regimes.append(optimizer.report.regime)
    return optimizer, regimes, losses


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def test_a_small_deterministic_task_stays_exact():
    x = torch.randn(64, 3)
    _, regimes, losses = run(small(), [(x, torch.sin(x.sum(1, keepdim=True)))] * 30)
    assert set(regimes) == {"exact"}
    assert losses[-1] < 1e-4 * losses[0]


def test_noise_ends_the_exact_regime_for_good():
    torch.manual_seed(1)
    batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(40)]  # nothing to learn
    _, regimes, _ = run(small(), batches)
    change = regimes.index("plane")
    assert 2 <= change < 40
    assert set(regimes[:change]) == {"exact"}
    assert set(regimes[change:]) == {"plane"}


def test_where_factorizations_are_dear_it_starts_in_the_plane():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 40))
    x, y = torch.randn(256, 100), torch.randint(40, (256,))
    optimizer = tn.Newton(model.parameters())
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(x), y))) for _ in range(25)]
    assert optimizer.report.regime == "plane"
    assert "plane of 2 directions" in optimizer.report.solver
    assert losses[-1] < 0.1 * losses[0]


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


def test_trust_is_a_running_average_of_bounded_ratios():
    choice = RegimeChoice(memory=0.5)
    assert choice.trust(0.4, 0.2) == pytest.approx(0.3)
    assert choice.trust(0.0, -50.0) == -0.5
    assert choice.trust(0.0, 9.0) == 0.5


def test_the_regime_survives_a_checkpoint():
    torch.manual_seed(1)
    batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(40)]
    model = small()
    optimizer, regimes, _ = run(model, batches)
    assert regimes[-1] == "plane"
    again = tn.Newton(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    again.step(lambda: F.mse_loss(model(batches[0][0]), batches[0][1]))
    assert again.report.regime == "plane"
