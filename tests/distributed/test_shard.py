"""Parameters in parts on two and four ranks, each with its own samples, make the steps of one process."""

from __future__ import annotations

import pytest
import torch
from ranks import launch
from reference import assert_close
from shard_cases import METHODS, whole


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("shard_cases", 4, tmp_path_factory)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch("shard_cases", 2, tmp_path_factory, only=("on_methods", "on_uneven"))


def assert_same(found, name, rtol=1e-10, **how):
    """On every rank bit for bit the same, and what one process does."""
    expected, steps = whole(name, **how)
    theta, reports = found[0]
    for other in found[1:]:
        assert torch.equal(other[0], theta)
        assert other[1] == reports
    assert_close(theta, expected, rtol)
    for (loss, damping, iterations, accepted), there in zip(reports, steps, strict=True):
        assert loss == pytest.approx(there[0], rel=1e-9)
        assert damping == pytest.approx(there[1], rel=1e-6)
        assert (iterations, accepted) == there[2:]


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_on_four_ranks_are_those_of_one_process(name, ranks):
    assert_same([found["on_methods"][name] for found in ranks], name)


@pytest.mark.parametrize("name", ["newton", "cg", "sgn", "newton-krylov", "hessian-free", "newton-cg"])
def test_ten_steps_on_two_ranks_are_those_of_one_process(name, two):
    assert_same([found["on_methods"][name] for found in two], name)
