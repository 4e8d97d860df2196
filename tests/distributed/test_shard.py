"""Parameters in parts on two and four ranks, each with its own samples, make the steps of one process."""

from __future__ import annotations

import pytest
import torch
from ranks import launch
from reference import assert_close
from shard_cases import METHODS, OTHERS, SHORT, make_model, saddle_steps, text_steps, whole

import torchnewton as tn


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("shard_cases", 4, tmp_path_factory)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch("shard_cases", 2, tmp_path_factory, only=("on_methods", "on_bytes"))


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


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_on_two_ranks_are_those_of_one_process(name, two):
    assert_same([found["on_methods"][name] for found in two], name)


@pytest.mark.parametrize("name", OTHERS)
def test_other_parts_of_a_step_are_those_of_one_process(name, ranks):
    assert_same([found["on_others"][name] for found in ranks], name, steps=SHORT)


@pytest.mark.parametrize(
    ("case", "name", "how"),
    [
        ("on_uneven", "cg", {}),
        ("on_empty_rank", "cg", {}),
        ("on_subset", "newton-cg", {"subset": True}),
        ("on_sums", "cg", {"reduction": "sum"}),
    ],
)
def test_weights_are_exact(case, name, how, ranks):
    assert_same([found[case] for found in ranks], name, steps=SHORT, **how)


def test_kronecker_factors_are_those_of_whole_parameters(ranks):
    for rank in ranks:
        (theta, regime, loss, solvers), (expected, *there) = rank["on_kronecker_factors"]
        assert regime == there[0] == "plane"
        assert "heavy ball" in solvers
        assert solvers == there[2]
        assert_close(theta, expected, 1e-8)
        assert loss == pytest.approx(there[1], rel=1e-9)


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_fall_with_the_number_of_ranks(size, ranks, two):
    """Each vector of a rank has the bytes of its parameters, and these add up to the model's."""
    scalar, total = 8, 8 * sum(p.numel() for p in make_model().parameters())
    found = [rank["on_bytes"] for rank in (ranks if size == 4 else two)]
    assert sum(parameters for parameters, *_ in found) == total + (size - 1) * scalar
    assert max(parameters for parameters, *_ in found) < 1.2 * total / size + scalar
    for parameters, vectors, state, num_state, kept, num_kept in found:
        # θ now and before the step, g, m, m̂, −m̂, x, r, p, last step and momentum, old m and last step
        assert vectors == 13 * parameters
        assert num_state == 2 * 8  # last step and momentum of eight parameters
        assert state == 2 * parameters
        assert kept == scalar * num_kept  # nothing of the whole parameters


def test_a_stored_module_looks_as_before(ranks):
    for rank in ranks:
        found = rank["on_stored"]
        assert found["names"][0] == found["names"][1]
        assert found["rank 0's"]
        assert found["loaded"]
        assert found["between"]
        assert found["outputs"] < 1e-14
        assert found["tied"]
        assert found["single"] == (True, torch.float32)
        assert found["refused"].startswith("RuntimeError: Error(s) in loading state_dict for ShardedNet")
        for gradient, there in found["gradients"]:
            assert_close(gradient, there)
    rows = [sum(column) for column in zip(*(rank["on_stored"]["rows"] for rank in ranks), strict=True)]
    assert rows == [len(p) if p.dim() else 4 for p in make_model().parameters()]


def test_a_saddle_is_left_as_in_one_process(ranks):
    theta, steps = saddle_steps(False)
    assert steps[0][0] == "negative curvature"
    assert steps[-1][1] < 0.9 * steps[0][1]
    for rank in ranks:
        assert [solver for solver, _ in rank["on_saddle"][1]] == [solver for solver, _ in steps]
        assert_close(rank["on_saddle"][0], theta, 1e-9)


def test_layers_of_many_kinds(ranks):
    theta, batches, accepted = text_steps(False)
    for rank in ranks:
        found = rank["on_layers"]
        assert_close(found[0], theta)
        assert found[1:] == (batches, accepted) == (2, True)


def test_a_failure_on_one_rank_is_one_on_all(ranks):
    for number, rank in enumerate(ranks):
        failed, untouched, status, accepted, moved = rank["on_failures"]
        assert failed.startswith("RuntimeError: mat1" if number == 1 else "ClosureError: rank 1 has failed")
        assert untouched
        assert status == "rejected: the loss is not finite"
        assert accepted
        assert moved


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("twice", "the parameter 'scale' is a DTensor already"),
        ("ddp", "is under DistributedDataParallel"),
        ("mesh", "has 2 dimensions"),
        ("group", "process_group: the parameters are in parts on other ranks"),
        ("stream", "process_group: the batches of tn.over"),
        ("partition", "0.weight belongs to ShardedLinear"),
        ("blocks", "Diagonalized: parameters that `shard` has cut have no blocks yet"),
    ],
)
def test_misuse_is_named(case, message, ranks):
    for rank in ranks:
        assert rank["on_refusals"][case].startswith("ValueError: ")
        assert message in rank["on_refusals"][case]


def test_without_processes():
    with pytest.raises(ValueError, match="not initialized"):
        tn.shard(make_model())
