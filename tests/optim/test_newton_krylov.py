"""Saddles are left, disturbing directions end the Krylov loop, products by either way give the same run."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from methods import differences, make_batch, make_model, snapshot, train
from reference import assert_close, flat
from torch import nn
from zoo import integers, uniform

import torchnewton as tn

SOLVERS = {
    "cg": tn.CG(rtol=1e-10),
    "minres": tn.MINRES(rtol=1e-10, stop_at_negative_curvature=True),
    "bicgstab": tn.BiCGSTAB(rtol=1e-10),
}
EACH_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def saddle(theta):
    """½x² − ½y² + ¼y⁴ (+ ½z²): a saddle of height 0 at the origin, minima of −¼ at y = ±1."""
    return 0.5 * theta[0] ** 2 - 0.5 * theta[1] ** 2 + 0.25 * theta[1] ** 4 + 0.5 * theta[2] ** 2


@EACH_SOLVER
def test_quadratic_is_solved_in_one_step(solver):
    theta, H = parameter(1, -2, 3), torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    optimizer = tn.NewtonKrylov([theta], solver=solver, trust_region=tn.TrustRegion(radius=10.0))
    optimizer.step(lambda: 0.5 * theta @ H @ theta + theta.sum())
    assert_close(theta.detach(), -1 / H.diagonal(), 1e-9)
    assert optimizer.report.status == tn.Status.CONVERGED.value
    assert optimizer.report.reduction_ratio == pytest.approx(1)
    assert math.isfinite(optimizer.report.radius)


@EACH_SOLVER
@pytest.mark.parametrize("start", [(0, 0, 0), (1e-9, 0, 0), (0.5, 0, 0.3), (0.5, 1e-6, -0.3), (0, -1e-12, 0)])
def test_planted_saddle_is_left_in_a_few_steps(start, solver):
    theta = parameter(*start)
    optimizer = tn.NewtonKrylov([theta], solver=solver)
    statuses = []
    for _ in range(12):
        optimizer.step(lambda: saddle(theta))
        statuses.append(optimizer.report.status)
    assert float(saddle(theta.detach())) == pytest.approx(-0.25, abs=1e-4)
    assert tn.Status.NEGATIVE_CURVATURE.value in statuses


def test_without_escape_it_stays_at_the_saddle():
    theta = parameter(0, 0, 0)
    optimizer = tn.NewtonKrylov([theta], escape=None)
    optimizer.step(lambda: saddle(theta))
    assert theta.tolist() == [0, 0, 0]
    assert "stationary" in optimizer.report.status


def test_minimum_with_zero_gradient_is_kept():
    theta = parameter(0, 1, 0)
    optimizer = tn.NewtonKrylov([theta])
    optimizer.step(lambda: saddle(theta))
    assert theta.tolist() == [0, 1, 0]
    assert "stationary" in optimizer.report.status
    assert not optimizer.report.accepted


@pytest.mark.parametrize("spread", [0.0, 1e-4])
def test_network_at_a_saddle(spread):
    """With all weights zero only the output bias has a gradient, and none once the mean is predicted."""
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    for i, p in enumerate(net.parameters()):
        nn.init.zeros_(p)
        p.data += spread * uniform(*p.shape, seed=i).double()
    x = uniform(40, 2).double()
    t = x[:, :1] - 0.5 * x[:, 1:]
    t = t - t.mean()
    optimizer = tn.NewtonKrylov(net.parameters())

    def closure():
        return F.mse_loss(net(x), t)

    start = closure().item()
    for _ in range(15):
        optimizer.step(closure)
    assert closure().item() < 0.05 * start
    adam = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    for p in adam.parameters():
        nn.init.zeros_(p)
    (*_, g) = torch.autograd.grad(F.mse_loss(adam(x), t), list(adam.parameters()))
    assert float(g.abs()) < 1e-12  # so that there is nothing to follow but curvature


def regression(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, t = uniform(30, 3).double(), uniform(30, 2, seed=4).double()
    return net, lambda: F.mse_loss(net(x), t)


@EACH_SOLVER
def test_complex_step_and_double_backward_make_the_same_steps(solver):
    ends, statuses = [], []
    for curvature in (tn.Hessian, tn.ComplexStepHessian.of):
        net, closure = regression()
        optimizer = tn.NewtonKrylov(net.parameters(), curvature=curvature, solver=solver)
        found = []
        for _ in range(6):
            optimizer.step(closure)
            found.append((optimizer.report.status, optimizer.report.inner_iterations))
        ends.append(flat(net.parameters()))
        statuses.append(found)
    assert_close(ends[1], ends[0], 1e-8)
    assert statuses[0] == statuses[1]


def test_complex_step_counts_its_dearer_products():
    work = []
    for curvature in (tn.Hessian, tn.ComplexStepHessian.of):
        net, closure = regression()
        optimizer = tn.NewtonKrylov(net.parameters(), curvature=curvature, disagreement=None)
        optimizer.step(closure)
        report = optimizer.report
        work.append((report.gradient_equivalents - 1 - report.loss_evaluations / 3) / report.products)
    assert work == pytest.approx([2, 8 / 3])


# f(θ) = ½θᵀ diag(h) θ from θ = (1, …): how CG ends.
REASONS = {
    "NEGATIVE_CURVATURE": ((4.0, 1.0, -1.0), 100.0),
    "FLAT": ((1.0, 0.0), 100.0),
    "BOUNDARY": ((4.0, 1.0), 0.1),
    "CONVERGED": ((4.0, 1.0), 100.0),
}


@pytest.mark.parametrize("name", REASONS)
def test_report_names_why_the_loop_ended(name):
    h, radius = REASONS[name]
    theta = parameter(*[1.0 for _ in h])
    h = torch.tensor(h, dtype=torch.float64)
    tilt = torch.tensor([0.5 if x == 0 else 0.0 for x in h], dtype=torch.float64)
    optimizer = tn.NewtonKrylov([theta], trust_region=tn.TrustRegion(radius=radius), escape=None)
    optimizer.step(lambda: 0.5 * (h * theta * theta).sum() + tilt @ theta + 10)
    assert optimizer.report.status == tn.Status[name].value
    assert optimizer.report.accepted
    assert optimizer.report.radius == radius


@EACH_SOLVER
def test_iterate_before_a_disturbing_direction_is_kept(solver):
    A = torch.diag(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))
    b = [torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64)]
    found = tn.UntilDisturbed(solver, radius=7.0).solve(A, b)
    assert found.status is tn.Status.NEGATIVE_CURVATURE
    assert found.num_iterations >= 1
    assert found.num_products == found.num_iterations + 1 or isinstance(solver, tn.BiCGSTAB)
    assert_close(found.residual[0], b[0] - A @ found.solution[0], 1e-12)
    assert float(b[0] @ found.solution[0]) > 0
    p = found.negative_curvature[0]
    assert float(p @ A @ p) < 0


@EACH_SOLVER
@pytest.mark.parametrize(("sign", "length"), [(-1.0, 7.0), (1.0, 0.5)])
def test_first_direction_that_disturbs_is_still_taken(solver, sign, length):
    """To the radius where its curvature is negative, to its minimum where the halves disagree."""
    A = NoisyMatrix(torch.diag(torch.tensor([2.0, 2.0]).double()) * sign, noise=lambda p: 3.0)
    b = [torch.tensor([0.6, 0.8], dtype=torch.float64)]
    found = tn.UntilDisturbed(solver, radius=7.0, disagreement=1.0).solve(A, b)
    assert_close(found.solution[0], length * b[0], 1e-12)
    assert found.status is (tn.Status.DISAGREEMENT if sign > 0 else tn.Status.NEGATIVE_CURVATURE)
    assert found.num_products == 1


class NoisyMatrix:
    """A matrix that tells how far its halves are apart."""

    def __init__(self, matrix, noise):
        self.matrix, self.noise = matrix, noise

    def __matmul__(self, v):
        return [self.matrix @ v[0]] if isinstance(v, list) else self.matrix @ v

    def disagreement(self, p, curvature):
        return self.noise(p[0])


def test_solver_starts_anew_from_x0():
    A = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    b, x0 = [torch.tensor([2.0, 1.0]).double()], [torch.tensor([5.0, -1.0]).double()]
    found = tn.UntilDisturbed(tn.CG(rtol=1e-12)).solve(A, b, x0)
    assert_close(found.solution[0], torch.ones(2).double(), 1e-10)


@pytest.mark.parametrize("loss", ["mse", "cross entropy", "two losses"])
def test_disagreement_is_the_root_mean_square_over_halves(loss):
    """Against Hessians of random halves by double backward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    params = list(net.parameters())
    x, t, y = uniform(12, 3).double(), uniform(12, 2, seed=4).double(), integers(2, 12)

    def value(rows):
        z = net(x[rows])
        total = z.new_zeros(())
        if loss != "cross entropy":
            total = total + F.mse_loss(z, t[rows], reduction="sum") / 24
        if loss != "mse":
            total = total + F.cross_entropy(z, y[rows], reduction="sum") / 12
        return total

    p = [torch.randn_like(q) for q in params]

    def curvature(rows):
        H = tn.Hessian(tn.record(lambda: value(rows), params))
        return sum(float((a * b).sum()) for a, b in zip(p, H @ p, strict=True))

    everything = torch.arange(12)
    total = curvature(everything)
    squares = []
    for _ in range(200):
        order = torch.randperm(12)
        q = curvature(order[:6])
        squares.append((2 * q - total) ** 2)
    expected = math.sqrt(sum(squares) / len(squares)) / abs(total)
    tape = tn.record(lambda: value(everything), params)
    found = tn.Halves(tn.Hessian(tape), tape).disagreement(p, abs(total))
    assert found == pytest.approx(expected, rel=0.15)


def test_noisy_direction_ends_the_loop():
    """One feature is of a single sample: half of the batch knows nothing of its curvature."""
    theta = parameter(1.0, 1.0)
    x = torch.zeros(50, 2, dtype=torch.float64)
    x[:, 0] = 1.0
    x[0, 1] = 3.0

    def closure():
        return F.mse_loss(x @ theta, torch.zeros(50, dtype=torch.float64))

    reports = []
    for disagreement in (0.5, None):
        theta.data.fill_(1.0)
        optimizer = tn.NewtonKrylov(
            [theta], disagreement=disagreement, trust_region=tn.TrustRegion(radius=10.0), solver=tn.CG(rtol=1e-8)
        )
        optimizer.step(closure)
        reports.append(optimizer.report)
    assert reports[0].status == tn.Status.DISAGREEMENT.value
    assert reports[0].inner_iterations < reports[1].inner_iterations
    assert reports[1].status == tn.Status.CONVERGED.value


def test_no_answer_of_the_halves_without_a_split():
    theta = parameter(1.0, 2.0)
    tape = tn.record(lambda: theta.cos().sum(), [theta])
    assert tn.Halves(tn.Hessian(tape), tape).disagreement([torch.ones(2).double()], 4.0) is None


def test_penalty_beside_the_outputs_needs_no_warning():
    """The Hessian has it, the Gauss-Newton matrix has not."""
    net, closure = regression()

    def penalized():
        return closure() + 1e-3 * sum(p.square().sum() for p in net.parameters())

    tn.NewtonKrylov(net.parameters()).step(penalized)
    with pytest.warns(UserWarning, match="beside the recorded outputs"):
        tn.NewtonKrylov(net.parameters(), curvature=tn.GaussNewton).step(penalized)


def search(function, slope, curved, length=1.0, radius=1.0, **arguments):
    calls = []

    def evaluate(alpha):
        calls.append(alpha)
        return function(alpha)

    found, radius = tn.TrustRegion(**arguments).search(evaluate, function(0.0), slope, curved, length, radius)
    return found, radius, calls


def test_exact_model_doubles_the_radius():
    found, radius, calls = search(lambda a: -a + 0.5 * a * a, -1.0, 1.0, length=3.0, radius=2.0)
    assert calls == [pytest.approx(2 / 3)]
    assert found.accepted
    assert radius == pytest.approx(4.0)


def test_taylor_error_shrinks_step_and_radius():
    """f = −α + α³ has e = α² against −α: 1 at α = 1, then √¼ of it, where e = ¼."""
    found, radius, calls = search(lambda a: -a + a**3, -1.0, 0.0)
    assert calls == [1.0, pytest.approx(0.5)]
    assert found.accepted
    assert radius == pytest.approx(1.0)


def test_more_decrease_than_predicted_is_taken_without_growth():
    found, radius, calls = search(lambda a: -3 * a, -1.0, 0.0)
    assert calls == [1.0]
    assert found.accepted
    assert radius == 1.0


def test_nothing_but_infinity_is_refused():
    found, radius, calls = search(lambda a: 0.0 if a == 0 else math.inf, -1.0, 0.0, max_trials=5)
    assert not found.accepted
    assert len(calls) == 5
    assert radius < 0.5**5


def test_sufficient_decrease_along_negative_curvature():
    """Slope 0, curvature −1: −½α² is asked for to one part in 10⁴."""
    assert search(lambda a: -0.5 * a * a, 0.0, -1.0)[0].accepted
    assert not search(lambda a: 0.0, 0.0, -1.0)[0].accepted


def test_rejected_step_keeps_parameters_and_shrinks_the_radius():
    model = make_model()
    optimizer = tn.NewtonKrylov(model.parameters())
    train(model, optimizer, 0, 2)
    before, radius = snapshot(model), optimizer.radius
    x, y = make_batch(2)
    optimizer.step(lambda: F.cross_entropy(model(x), y) * math.nan)
    assert differences(snapshot(model), before) == []
    assert optimizer.radius == radius / 4


def test_it_ends_at_a_minimum():
    net, closure = regression()
    optimizer = tn.NewtonKrylov(net.parameters(), disagreement=None, weight_decay=1e-3)
    for _ in range(55):
        optimizer.step(closure)
    assert optimizer.report.gradient_norm < 1e-10
    assert optimizer.radius > 1e-3  # although rounding decides at the end


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (partial(tn.NewtonKrylov, epsilon=-1.0), "epsilon=-1"),
        (partial(tn.NewtonKrylov, disagreement=0.0), "disagreement=0"),
        (partial(tn.Newton, escape=tn.SaddleEscape()), "trust_region"),
        (lambda params: tn.TrustRegion(radius=-1.0), "radius=-1"),
        (lambda params: tn.TrustRegion(small=0.9), "small=0.9"),
        (lambda params: tn.SaddleEscape(num_products=0), "num_products=0"),
    ],
)
def test_bad_arguments(make, word):
    with pytest.raises(ValueError, match=word):
        make(make_model().parameters())
