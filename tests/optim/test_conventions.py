"""What the numbers mean: hand-computed 2×2 cases, dense references of one step, and known minima."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, dense_reference, flat, like
from scipy.optimize import minimize
from torch import nn
from zoo import ZOO, integers, uniform

import torchnewton as tn
from torchnewton.optim.point import Point

SOLVERS = {
    "cg": tn.CG(rtol=1e-13, max_iterations=300),
    "direct": tn.Direct(),
    "auto": tn.Auto(cg=tn.CG(rtol=1e-13, max_iterations=300)),
}
plain = partial(tn.Newton, line_search=tn.FullStep(), acceleration=None)
EACH_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# f(θ) = ‖Xθ‖², X = (1 0; 1 1), θ = (1, 2): f = 10, g = 2XᵀXθ = (8, 6), G = 2XᵀX = (4 2; 2 2).
HAND = {
    # λ = 2: (6 2; 2 4) d = −g gives d = −(1, 1), f(0, 1) = 1; the model without λ predicts 14 − ½·10 = 9
    "damping": (
        {"damping": tn.ConstantDamping(2.0)},
        {
            "theta": (0, 1),
            "gradient_norm": 10.0,
            "predicted_reduction": 9.0,
            "actual_reduction": 9.0,
            "reduction_ratio": 1.0,
        },
    ),
    # with λ it predicts ½λ‖d‖² = 2 less
    "damping in the model": (
        {"damping": tn.ConstantDamping(2.0, damped_model=True)},
        {
            "theta": (0, 1),
            "gradient_norm": 10.0,
            "predicted_reduction": 7.0,
            "actual_reduction": 9.0,
            "reduction_ratio": 9 / 7,
        },
    ),
    # w = 2: F = 10 + ½·2·5 = 15, g = (10, 10), d = −(1, 2), F(0, 0) = 0; predicted 30 − ½·30
    "weight decay": (
        {"damping": tn.ConstantDamping(0.0), "weight_decay": 2.0},
        {
            "theta": (0, 0),
            "gradient_norm": 200**0.5,
            "predicted_reduction": 15.0,
            "actual_reduction": 15.0,
            "reduction_ratio": 1.0,
        },
    ),
    # λ = 2 again, at most half the step: predicted 7 − ½·10/4, f(½, 3/2) = 17/4
    "half a step": (
        {"damping": tn.ConstantDamping(2.0), "line_search": tn.Armijo(decrease=0.8, max_halvings=1)},
        {
            "theta": (0.5, 1.5),
            "gradient_norm": 10.0,
            "predicted_reduction": 5.75,
            "actual_reduction": 5.75,
            "step_length": 0.5,
        },
    ),
}


@EACH_SOLVER
@pytest.mark.parametrize("case", HAND)
def test_two_by_two_by_hand(case, solver):
    arguments, expected = HAND[case]
    theta = nn.Parameter(tensor(1, 2))
    x = torch.tensor([[1, 0], [1, 1]], dtype=torch.float64)
    optimizer = tn.Newton([theta], solver=solver, **arguments)
    loss = optimizer.step(lambda: F.mse_loss(x @ theta, torch.zeros_like(theta), reduction="sum"))
    assert loss.item() == 10
    assert optimizer.report.loss == 10
    assert optimizer.report.accepted
    assert optimizer.report.damping == arguments["damping"].value
    found = {name: getattr(optimizer.report, name) for name in expected if name != "theta"}
    assert found == pytest.approx({name: value for name, value in expected.items() if name != "theta"})
    assert theta.detach().numpy() == pytest.approx(np.array(expected["theta"]), abs=1e-9)


@EACH_SOLVER
def test_linear_least_squares_is_solved_in_one_step(solver):
    layer = nn.Linear(4, 2).double()
    x, t = uniform(12, 4).double(), uniform(12, 2, seed=4).double()
    optimizer = tn.Newton(layer.parameters(), solver=solver, damping=tn.ConstantDamping(0.0))
    optimizer.step(lambda: F.mse_loss(layer(x), t))
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(12, 1)], dim=1), t).solution
    assert_close(layer.weight, exact[:4].T, 1e-9)
    assert_close(layer.bias, exact[4], 1e-9)
    assert optimizer.report.reduction_ratio == pytest.approx(1)


@pytest.mark.parametrize("method", [tn.Newton, tn.SGN])
def test_logistic_regression_ends_at_the_minimum(method):
    layer = nn.Linear(4, 3).double()
    x, y = uniform(30, 4).double(), integers(3, 30)

    def objective(theta):
        weight, bias = torch.from_numpy(theta).requires_grad_().split([12, 3])
        f = F.cross_entropy(x @ weight.view(3, 4).T + bias, y) + 0.5 * 0.1 * (
            weight.square().sum() + bias.square().sum()
        )
        return f.item(), torch.cat(torch.autograd.grad(f, [weight, bias])).numpy()

    found = minimize(objective, np.zeros(15), jac=True, method="BFGS", options={"gtol": 1e-9})
    optimizer = method(layer.parameters(), weight_decay=0.1)
    for _ in range(60):
        optimizer.step(lambda: F.cross_entropy(layer(x), y))
    assert flat(layer.parameters()).numpy() == pytest.approx(found.x, abs=1e-6)
    assert optimizer.report.gradient_norm < 1e-6


def expected_step(problem, damping, weight_decay=0.0):
    """θ − (G + diag(w) + λI)⁻¹(g + w∘θ), by a dense solve."""
    r = dense_reference(problem.params, problem.outputs, problem.loss)
    theta = flat(problem.params)
    w = torch.as_tensor(weight_decay, dtype=torch.float64).expand(theta.shape)
    return theta - torch.linalg.solve(r.gauss_newton + torch.diag(w + damping), r.gradient + w * theta)


@EACH_SOLVER
@pytest.mark.parametrize(
    "name", ["mlp", "lstm", "gpt", "two-losses", "physics-informed", "accumulated", "some-parameters"]
)
def test_one_damped_step_of_the_zoo(name, solver):
    p = ZOO[name](torch.float64)
    expected = expected_step(p, damping=0.5)
    optimizer = plain(p.params, solver=solver, damping=tn.ConstantDamping(0.5))
    optimizer.step(p.closure)
    assert optimizer.report.accepted
    assert_close(flat(p.params), expected, 1e-8)


@EACH_SOLVER
def test_parameter_groups_with_their_own_weight_decay(solver):
    p = ZOO["mlp"](torch.float64)
    decays = [0.1, 0.0, 0.7, 0.3]
    sizes = [q.numel() for q in p.params]
    w = torch.cat([torch.full((n,), decay) for n, decay in zip(sizes, decays, strict=True)]).double()
    expected = expected_step(p, damping=0.2, weight_decay=w)
    groups = [{"params": [q], "weight_decay": decay} for q, decay in zip(p.params, decays, strict=True)]
    optimizer = plain(groups[:2], solver=solver, damping=tn.ConstantDamping(0.2))
    for group in groups[2:]:
        optimizer.add_param_group(group)
    optimizer.step(p.closure)
    assert_close(flat(p.params), expected, 1e-8)


@EACH_SOLVER
def test_frozen_and_unused_parameters_stay(solver):
    p = ZOO["frozen-and-unused"](torch.float64)
    before = [q.detach().clone() for q in p.params]
    expected = expected_step(p, damping=0.5)
    optimizer = plain(p.params, solver=solver, damping=tn.ConstantDamping(0.5))
    optimizer.step(p.closure)
    assert_close(flat(p.params), expected, 1e-8)
    stays = [torch.equal(q, old) for q, old in zip(p.params, before, strict=True)]
    assert stays == [True, True, False, False, True, True]


@pytest.mark.parametrize("limit", [10.0, 0.0])
def test_geodesic_acceleration(limit):
    """v + ½a with (G + λI)a = −JᵀB z″, or v where 2‖a‖ > limit·‖v‖."""
    p = ZOO["mlp"](torch.float64)
    r = dense_reference(p.params, p.outputs, p.loss)
    theta = flat(p.params)
    A = r.gauss_newton + 0.1 * torch.eye(len(theta), dtype=torch.float64)
    v = -torch.linalg.solve(A, r.gradient)

    def outputs(step):
        moved = dict(zip("abcd", like(p.params, theta + step * v), strict=True))
        hidden = torch.tanh(F.linear(uniform(5, 3).double(), moved["a"], moved["b"]))
        return F.linear(hidden, moved["c"], moved["d"]).flatten()

    second = (outputs(0.1) - 2 * outputs(0.0) + outputs(-0.1)) / 0.01
    a = -torch.linalg.solve(A, r.jacobian.T @ r.output_hessian @ second)
    assert 0.01 * v.norm() < a.norm() < 5 * v.norm()
    optimizer = tn.Newton(
        p.params,
        solver=tn.Direct(),
        damping=tn.ConstantDamping(0.1),
        line_search=tn.FullStep(),
        acceleration=tn.GeodesicAcceleration(spacing=0.1, limit=limit),
    )
    optimizer.step(p.closure)
    assert_close(flat(p.params), theta + v + (0.5 * a if limit else 0.0), 1e-8)


def test_curvature_from_another_batch():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    params = list(net.parameters())

    def problem(samples, seed):
        x, y = uniform(samples, 3, seed=seed).double(), integers(3, samples, seed=seed)
        return params, lambda: [net(x)], lambda z: F.cross_entropy(z, y)

    def closure_of(params, outputs, loss):
        return lambda: loss(*outputs())

    here, there = problem(5, 11), problem(3, 12)
    r = dense_reference(*here)
    A = dense_reference(*there).gauss_newton + 0.5 * torch.eye(len(r.gradient), dtype=torch.float64)
    expected = flat(params) - torch.linalg.solve(A, r.gradient)
    optimizer = plain(params, solver=tn.Direct(), damping=tn.ConstantDamping(0.5))
    loss = optimizer.step(closure_of(*here), curvature=closure_of(*there))
    assert_close(loss, r.loss)
    assert_close(flat(params), expected, 1e-8)


def test_levenberg_marquardt_follows_the_reduction_ratio():
    p = ZOO["mlp"](torch.float64)
    rule = tn.LevenbergMarquardt(initial=1e-3, increase=3.0, decrease=0.25, lower=0.3, upper=0.6)
    optimizer = tn.Newton(p.params, damping=rule)
    expected = 1e-3
    factors = set()
    for _ in range(12):
        optimizer.step(p.closure)
        report = optimizer.report
        assert report.damping == pytest.approx(expected)
        factor = (
            3.0
            if not report.accepted or report.reduction_ratio < 0.3
            else 0.25
            if report.reduction_ratio > 0.6
            else 1.0
        )
        expected *= factor
        factors.add(factor)
    assert 0.25 in factors


def sgn_by_hand(problem, steps, max_iterations, beta):
    """SGN on dense matrices, with a λ that keeps CG well conditioned."""
    damping, m = 1.0, 0.0
    for t in range(1, steps + 1):
        r = dense_reference(problem.params, problem.outputs, problem.loss)
        m = beta * m + (1 - beta) * r.gradient
        g = m / (1 - beta**t)
        A = r.gauss_newton + damping * torch.eye(len(g), dtype=g.dtype)
        d, residual = conjugate_gradients(A, -g, 10 if t <= 9 else max_iterations)
        start = flat(problem.params)

        def value(alpha, start=start, d=d):
            with torch.no_grad():
                for p, new in zip(problem.params, like(problem.params, start + alpha * d), strict=True):
                    p.copy_(new)
            return problem.closure().item()

        f, slope = r.loss.item(), float(g @ d)
        ratio = (f - value(1.0)) / -float(0.5 * (g - residual) @ d)
        damping = damping * 1.5 if ratio < 0.25 else max(damping * 2 / 3, 0.3) if ratio > 0.75 else damping
        alpha = 1.0
        for _ in range(10):
            if value(alpha) <= f + 1e-4 * slope:
                break
            alpha /= 2
        value(alpha)
    return damping


def conjugate_gradients(A, b, max_iterations):
    """The textbook; returns x and b − Ax."""
    x, r = torch.zeros_like(b), b.clone()
    p = r.clone()
    for _ in range(max_iterations):
        if r.abs().max() <= 1e-6:
            break
        alpha = (r @ r) / (p @ A @ p)
        x, new = x + alpha * p, r - alpha * A @ p
        p = new + (new @ new) / (r @ r) * p
        r = new
    return x, r


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_sgn_is_the_published_method(beta):
    by_hand, ours = ZOO["mlp"](torch.float64), ZOO["mlp"](torch.float64)
    damping = sgn_by_hand(by_hand, 13, 3, beta)
    optimizer = tn.SGN(ours.params, max_iterations=3, momentum=beta, damping=1.0, min_damping=0.3)
    for _ in range(13):
        optimizer.step(ours.closure)
    assert_close(flat(ours.params), flat(by_hand.params), 1e-8)
    optimizer.step(ours.closure)
    assert optimizer.report.damping == pytest.approx(damping)


@pytest.mark.parametrize(
    ("options", "known"), [({}, True), ({"weight_decay": 0.1}, False), ({"momentum": 0.5}, False)], ids=str
)
def test_the_dual_solve_of_a_step_starts_from_the_slope_of_the_loss(options, known):
    """Where the right-hand side is −∇f of the tape itself; nothing has to be compared or negated for that."""
    seen = []

    class Watching(tn.Dual):
        def solve(self, A, b, x0=None, preconditioner=None):
            R, _ = A.factored()
            seen.append(b is R.tape.descent)
            return super().solve(A, b, x0, preconditioner)

    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])
    optimizer = tn.Newton(model.parameters(), solver=Watching(), **options)
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert seen == [known, known]


def test_a_matrix_that_is_not_positive_definite_raises_the_damping():
    """f = (θ² − 1)² has f'' = 12θ² − 4 = −3.88 at θ = 0.1: λ = 1, 2 are too small, 4 is not."""
    theta = torch.nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    rule = tn.LevenbergMarquardt(initial=1.0, increase=2.0)
    optimizer = tn.Newton([theta], curvature=tn.Hessian, solver=tn.Direct(), damping=rule, line_search=tn.Armijo())
    optimizer.step(lambda: (theta.square() - 1).square().sum())
    g = 4 * 0.1 * (0.01 - 1)
    assert optimizer.report.damping == 4.0
    assert optimizer.report.accepted
    assert float(theta.detach()) == pytest.approx(0.1 - optimizer.report.step_length * g / (12 * 0.01 - 4 + 4))


def test_a_constant_damping_that_is_too_small_ends_the_step():
    theta = torch.nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    optimizer = tn.Newton([theta], curvature=tn.Hessian, solver=tn.Direct(), damping=1.0)
    optimizer.step(lambda: (theta.square() - 1).square().sum())
    assert tn.Status.NOT_POSITIVE_DEFINITE.value in optimizer.report.status
    assert float(theta.detach()) == pytest.approx(0.1, abs=0)


@pytest.mark.parametrize("error", [ValueError, tn.RecordError])
def test_no_correction_where_the_closure_takes_another_course(error):
    """The outputs cannot be had beside the point: the direction stays as it is."""
    theta = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))

    def closure():
        if float(theta.detach()) > 1:
            raise error("outside")
        return F.mse_loss(theta.exp(), torch.zeros(1, dtype=torch.float64))

    point, velocity = Point(closure, [theta], [0.0]), [tensor(1.0)]
    assert tn.GeodesicAcceleration().corrected(point, velocity, lambda b: b) is velocity
    assert float(theta.detach()) == 1


@pytest.mark.parametrize(("decrease", "length"), [(1e-4, 1.0), (0.7, 0.5), (0.9, 0.125)])
def test_newton_cg_asks_for_its_sufficient_decrease(decrease, length):
    """On a quadratic f(αd) − f(0) = (1 − α/2)·α·gᵀd for the Newton step d: α ≤ 2(1 − decrease) is enough."""
    theta = torch.nn.Parameter(tensor(1.0, 2.0))
    optimizer = tn.NewtonCG([theta], damping=tn.ConstantDamping(0.0), rtol=1e-13, sufficient_decrease=decrease)
    optimizer.step(lambda: F.mse_loss(theta, torch.zeros(2, dtype=torch.float64), reduction="sum"))
    assert optimizer.report.step_length == length
