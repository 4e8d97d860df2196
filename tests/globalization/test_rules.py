"""Damping rules and line searches are functions of numbers: tested on numbers."""

from __future__ import annotations

import math

import pytest

import torchnewton as tn


def update(rule, damping, ratio, step_length=1.0, num_steps=1):
    return rule.update(damping, ratio, step_length, num_steps)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, 2 / 3), (0.76, 2 / 3), (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.24, 1.5), (-3.0, 1.5), (math.nan, 1.5)],
)
def test_levenberg_marquardt(ratio, expected):
    assert update(tn.LevenbergMarquardt(), 1.0, ratio) == pytest.approx(expected)


def test_levenberg_marquardt_stays_in_its_bounds():
    rule = tn.LevenbergMarquardt(initial=1e-4, minimum=1e-6, maximum=2.0)
    assert rule.start() == 1e-4
    assert update(rule, 1.1e-6, 1.0) == 1e-6
    assert update(rule, 1.9, 0.0) == 2.0
    assert update(tn.LevenbergMarquardt(), 0.0, -1.0) > 0


@pytest.mark.parametrize(
    "arguments", [{"increase": 0.5}, {"decrease": 1.5}, {"decrease": 0.0}, {"initial": -1.0}, {"minimum": 2.0}]
)
def test_levenberg_marquardt_names_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        tn.LevenbergMarquardt(**arguments)


def test_constant_and_scheduled():
    constant = tn.ConstantDamping(0.3)
    assert constant.start() == update(constant, 0.3, -5.0) == constant.raised(0.3) == 0.3
    scheduled = tn.ScheduledDamping(lambda step: 1.0 / (1 + step))
    assert scheduled.start() == 1.0
    assert update(scheduled, 1.0, 0.9, num_steps=3) == 0.25
    with pytest.raises(ValueError, match="value"):
        tn.ConstantDamping(-1.0)


def test_auto_damping_on_its_own_data():
    rule = tn.AutoDamping()
    assert rule.unit is tn.Unit.CURVATURE
    assert update(rule, 0.3, 0.9) == pytest.approx(0.1)
    assert update(rule, 0.3, 0.1) == pytest.approx(0.6)
    assert update(rule, 0.3, 0.9, step_length=0.5) == 0.3


@pytest.mark.parametrize(
    ("damping", "ratio", "length", "new", "expected"),
    [
        (0.003, 1.0, 1.0, 0.9, 0.001),  # it helped on new data
        (0.003, 1.0, 0.125, 0.9, 0.003),  # but the step had been cut short
        (0.003, 1.0, 1.0, 0.2, 0.003),
        (0.003, 1.0, 1.0, -0.1, 0.006),  # it fitted its own batch
        (0.02, 1.0, 1.0, -0.1, 0.03),  # not above the noise limit
        (0.5, 1.0, 1.0, -0.1, 0.5),  # nor back to it
        (0.003, 0.1, 1.0, 0.9, 0.006),  # the model was wrong on its own data
    ],
)
def test_auto_damping_on_new_data(damping, ratio, length, new, expected):
    assert tn.AutoDamping().update_on_new_data(damping, ratio, length, new) == pytest.approx(expected)


def along(values):
    """A function of α that counts its evaluations."""
    seen = []

    def evaluate(alpha):
        seen.append(alpha)
        return values(alpha)

    return evaluate, seen


def test_armijo_halves_until_the_decrease_suffices():
    evaluate, seen = along(lambda a: -a + 4 * a * a)
    found = tn.Armijo().search(evaluate, 0.0, -1.0, 3.0)
    assert (found.step_length, found.accepted) == (0.125, True)
    assert found.value == pytest.approx(-0.0625)
    assert seen == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("full", [math.nan, math.inf])
def test_armijo_goes_back_from_what_is_not_finite(full):
    evaluate, _ = along(lambda a: -a)
    assert tn.Armijo().search(evaluate, 0.0, -1.0, full).step_length == 0.5


def test_armijo_is_bounded_and_refuses():
    evaluate, seen = along(lambda a: 1.0)
    found = tn.Armijo(max_halvings=4).search(evaluate, 0.0, -1.0, 1.0)
    assert not found.accepted
    assert len(seen) == 4
    taken = tn.Armijo(max_halvings=4, accept_last=True).search(evaluate, 0.0, -1.0, 1.0)
    assert taken.accepted
    assert taken.step_length == 1 / 16
    nowhere, _ = along(lambda a: math.nan)
    assert not tn.Armijo(accept_last=True).search(nowhere, 0.0, -1.0, math.nan).accepted


def test_armijo_without_scaling_asks_for_the_full_decrease():
    evaluate, _ = along(lambda a: -0.4 * a)
    assert tn.Armijo(decrease=0.3).search(evaluate, 0.0, -1.0, 1.0).step_length == 0.5
    assert not tn.Armijo(decrease=0.3, scale_slope=False).search(evaluate, 0.0, -1.0, 1.0).accepted


@pytest.mark.parametrize("arguments", [{"contraction": 1.0}, {"contraction": 0.0}, {"max_halvings": -1}])
def test_misuse_of_armijo_names_the_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        tn.Armijo(**arguments)


def test_full_step():
    assert tn.FullStep().search(lambda a: 0.0, 0.0, -1.0, 7.0).accepted
    assert not tn.FullStep().search(lambda a: 0.0, 0.0, -1.0, math.nan).accepted
