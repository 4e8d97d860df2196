"""Arguments of the optimizers: what is none of its kind is refused at once, what is given is used in every step."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchnewton as tn

JACOBI = tn.Jacobi([torch.ones(2)])


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("argument", "value", "word"),
    [
        ("solver", "cg", r"tn\.CG\(\)"),
        ("solver", tn.CG, r"tn\.CG\(\)"),
        ("damping", "auto", "number or a rule"),
        ("damping", tn.AutoDamping, "number or a rule"),
        ("damping", -1.0, "must be a number that is not negative"),
        ("curvature", "hessian", r"tn\.Hessian"),
        ("line_search", 0.5, r"tn\.Armijo\(\)"),
        ("line_search", tn.FullStep, r"tn\.Armijo\(\)"),
        ("trust_region", 0.1, r"tn\.TrustRegion\(radius=0\.1\)"),
        ("preconditioner", JACOBI, r"tn\.KFAC\(\)"),
        ("preconditioner", tn.KFAC, r"tn\.KFAC\(\)"),
        ("acceleration", True, r"tn\.GeodesicAcceleration\(\)"),
        ("weight_decay", float("nan"), "weight_decay=nan"),
        ("weight_decay", -1.0, r"weight_decay=-1\.0"),
        ("momentum", 1.0, r"momentum=1\.0"),
    ],
)
def test_what_is_none_of_its_kind_is_refused_by_the_constructor(argument, value, word):
    with pytest.raises(ValueError, match=word):
        tn.Newton(params(), **{argument: value})


def test_parts_that_exclude_each_other():
    with pytest.raises(ValueError, match="escape"):
        tn.Newton(params(), escape=tn.SaddleEscape())
    with pytest.raises(ValueError, match="line_search"):
        tn.Newton(params(), line_search=tn.Armijo(), trust_region=tn.TrustRegion())
    with pytest.raises(ValueError, match="max_iterations=99"):
        tn.HessianFree(params(), solver=tn.CG(), max_iterations=99)


@pytest.mark.parametrize("method", [tn.Newton, tn.SGN, tn.NewtonCG, tn.HessianFree, tn.NewtonKrylov])
def test_the_weight_decay_of_a_group_is_checked_too(method):
    with pytest.raises(ValueError, match=rf"{method.__name__}: weight_decay=-5"):
        method([{"params": params(), "weight_decay": -5}])
    optimizer = method(params())
    with pytest.raises(ValueError, match="weight_decay=-5"):
        optimizer.add_param_group({"params": params(), "weight_decay": -5})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "make",
    [
        partial(tn.LevenbergMarquardt, lower=2, upper=-1),
        partial(tn.LevenbergMarquardt, lower=-0.5),
        partial(tn.AutoDamping, noise_limit=-1),
        partial(tn.AutoDamping, increase=0.5),
        partial(tn.Armijo, decrease=-3),
        partial(tn.Armijo, decrease=1.0),
        partial(tn.GeodesicAcceleration, spacing=0),
        partial(tn.GeodesicAcceleration, limit=-1),
        partial(tn.Dual, rtol=-1),
        partial(tn.Dual, max_refinements=-1),
        partial(tn.Auto, expected_iterations=-5),
        partial(tn.Auto, max_bytes=-1),
        partial(tn.MaxNorm, tolerance=-1),
        partial(tn.MartensProgress, window=0),
    ],
    ids=lambda make: f"{make.func.__name__}({make.keywords})",
)
def test_parts_refuse_numbers_without_a_meaning(make):
    with pytest.raises(ValueError, match=rf"{make.func.__name__}|LevenbergMarquardt") as error:
        make()
    assert all(f"{name}={value}" in str(error.value) for name, value in make.keywords.items())


def test_a_number_is_a_constant_damping_and_the_first_one_of_a_method_with_a_rule():
    assert tn.Newton(params(), damping=1e-2).damping == tn.ConstantDamping(1e-2)
    for method in (tn.NewtonCG, tn.HessianFree, tn.DistributedNewton):
        assert method(params(), damping=0.5).damping == tn.LevenbergMarquardt(initial=0.5)
        assert method(params(), damping=tn.ConstantDamping(0.5)).damping == tn.ConstantDamping(0.5)


def trained(num_steps: int, same_data: bool, **arguments) -> tuple[tn.Newton, list[str]]:
    """A small regression; returns the optimizer and the solvers of its steps."""
    x = torch.randn(160, 3, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1, keepdim=True)).sin()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer, solvers = tn.Newton(model.parameters(), **arguments), []
    for number in range(num_steps):
        part = slice(None) if same_data else slice(16 * (number % 10), 16 * (number % 10) + 16)
        optimizer.step(lambda part=part: F.mse_loss(model(x[part]), y[part]))
        solvers.append(optimizer.report.solver)
    return optimizer, solvers


@pytest.mark.parametrize("acceleration", [None, tn.GeodesicAcceleration(limit=0.5)])
def test_a_given_acceleration_is_that_of_every_exact_step(acceleration):
    optimizer, _ = trained(5, same_data=True, acceleration=acceleration)
    assert optimizer.report.regime == "exact"
    assert optimizer.acceleration == acceleration


class Halved:
    """Half of every step, counted."""

    def __init__(self) -> None:
        self.count = 0

    def search(self, evaluate, start, slope, full):
        self.count += 1
        return tn.Armijo(max_halvings=1).search(lambda a: -1e9, 0.0, -1.0, 0.0)


@pytest.mark.parametrize("same_data", [True, False])
def test_a_given_line_search_chooses_the_length_of_every_step(same_data):
    rule = Halved()
    optimizer, solvers = trained(30, same_data, line_search=rule)
    assert rule.count == 30
    assert optimizer.report.step_length == 0.5
    assert "heavy ball" not in solvers
    assert same_data or "heavy ball" in trained(30, same_data)[1]


@pytest.mark.parametrize("uses", [True, False])
def test_the_last_step_is_kept_for_a_solver_that_asks_for_it_alone(uses):
    class Asks(tn.CG):
        @property
        def uses_previous_step(self):
            return uses

    optimizer, _ = trained(2, True, solver=Asks(), damping=0.1)
    assert all(("last_step" in optimizer.state[p]) == uses for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("solver", [tn.Dual(), tn.Dual(num_shifts=100), tn.Direct()], ids=repr)
def test_a_search_tries_other_dampings_on_the_true_loss(solver):
    """From a λ that is far too large it goes down tenfold in each step, and no step is worse than without."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    y = torch.sin(x.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    losses = {}
    for search in ((), (0.1, 10.0)):
        twin = copy.deepcopy(model)
        rule = tn.LevenbergMarquardt(initial=100.0, search=search)
        optimizer = tn.Newton(twin.parameters(), solver=solver, damping=rule, acceleration=None)
        optimizer.step(lambda net=twin: F.mse_loss(net(x), y))
        assert optimizer.report.damping == pytest.approx(10.0 if search else 100.0)
        assert optimizer.report.loss_evaluations >= 3 * bool(search)
        losses[search] = F.mse_loss(twin(x), y).item()
    assert losses[0.1, 10.0] < losses[()]
