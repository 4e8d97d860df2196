"""Two and four processes make the steps that one makes."""

from __future__ import annotations

import math

import pytest
import torch
from data_parallel_cases import METHODS, STEPS, closure_of, make_batch, make_model, marked, plane, whole
from ranks import launch
from reference import assert_close

import torchnewton as tn
from torchnewton import vectors
from torchnewton.curvature import noise_scale


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("data_parallel_cases", 4, tmp_path_factory)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch("data_parallel_cases", 2, tmp_path_factory, only=("on_even", "on_uneven", "on_streams"))


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
    assert_same([found["on_even"][name] for found in ranks], name, steps=STEPS)


@pytest.mark.parametrize("name", ["newton", "sgn"])
def test_ten_steps_on_two_ranks_are_those_of_one_process(name, two):
    assert_same([found["on_even"][name] for found in two], name, steps=STEPS)


def test_weights_are_exact_on_two_ranks(two):
    assert_same([found["on_uneven"] for found in two], "cg")


@pytest.mark.parametrize(
    ("case", "name", "how"),
    [
        ("on_uneven", "cg", {}),
        ("on_empty_rank", "cg", {}),
        ("on_subset", "newton-cg", {"subset": True}),
        ("on_sums", "cg", {"reduction": "sum"}),
        ("on_marked", "cg", {"make_closure": marked}),
        ("on_ddp", "direct", {}),
    ],
)
def test_weights_are_exact(case, name, how, ranks):
    assert_same([found[case] for found in ranks], name, **how)


def test_ranks_that_round_in_another_way_agree(ranks):
    agreeing = [found["on_rounding"][0] for found in ranks]
    alone = [found["on_rounding"][1] for found in ranks]
    for theta, reports in agreeing[1:]:
        assert torch.equal(theta, agreeing[0][0])
        assert reports == agreeing[0][1]
    assert any(reports != alone[0][1] for _, reports in alone[1:])  # so the test can fail


def test_estimates_are_sums_over_the_ranks(ranks):
    model = make_model()
    A = tn.GaussNewton(tn.record(closure_of(model, *make_batch()), list(model.parameters())))
    dense, ones = A.to_dense(), torch.ones(A.shape[0], dtype=torch.float64)
    for rank in ranks:
        found = rank["on_estimates"]
        assert_close(found["dense"], dense)
        assert_close(found["diagonal"], dense.diagonal())
        assert found["trace"] == pytest.approx(float(dense.trace()))
        assert_close(found["form"].reshape(()), ones @ dense @ ones)
        for product in found["each"]:
            assert_close(vectors.flatten(product), dense @ ones)
        value, error = found["estimate"]
        assert bool(((value - dense.diagonal()).abs() <= 6 * error + 1e-12).all())
        assert 0 < float(error.sum()) < float(dense.diagonal().sum())


def test_kfac_is_the_same_on_all_ranks(ranks):
    theta, reports = ranks[0]["on_kfac"]
    for rank in ranks[1:]:
        assert torch.equal(rank["on_kfac"][0], theta)
    assert reports[-1][0] < 0.5 * reports[0][0]


def test_both_regimes_of_the_flagship_are_those_of_all_ranks(ranks):
    theta, steps = ranks[0]["on_plane"]
    for rank in ranks[1:]:
        assert torch.equal(rank["on_plane"][0], theta)
        assert rank["on_plane"][1] == steps
        assert rank["on_choices"] == ranks[0]["on_choices"]
    assert {math.isfinite(price) for price in ranks[0]["on_choices"]} == {False, True}
    assert [solver for _, _, solver in steps].count("heavy ball") >= 3
    model = make_model()
    optimizer = plane(model)
    for step, (loss, damping, solver) in enumerate(steps):
        optimizer.step(closure_of(model, *make_batch(step)))
        assert loss == pytest.approx(optimizer.report.loss, rel=1e-9)
        assert damping == pytest.approx(optimizer.report.damping, rel=1e-6)
        assert solver == optimizer.report.solver


def test_noise_and_kronecker_factors_of_means_and_sums(ranks):
    model = make_model()
    params = list(model.parameters())
    (mean, factors), (total, factors_of_sum) = ranks[0]["on_noise"]
    for reduction, found in (("mean", mean), ("sum", total)):
        tape = tn.record(closure_of(model, *make_batch(), reduction), params)
        assert found == pytest.approx(noise_scale(tape))
    assert_close(factors_of_sum, 3 * 128 * factors)
    dense = tn.GaussNewton(tape).to_dense()
    assert float(factors_of_sum.trace()) == pytest.approx(float(dense.trace()), rel=0.3)  # random u


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("name", "subset"), [("newton-cg", True), ("newton-cg", False), ("cg", False), ("hessian-free", True)]
)
def test_batches_of_every_rank_make_the_steps_of_one_process_with_all_data(name, subset, size, ranks, two):
    found = [rank["on_streams"][name, subset] for rank in (ranks if size == 4 else two)]
    assert_same(found, name, subset=subset)


def test_batches_of_every_rank_in_blocks(ranks):
    for rank in ranks:
        streamed, recorded = rank["on_streams_in_blocks"]
        assert_close(streamed, recorded)


def test_misuse_of_streams_is_named(ranks):
    for number, rank in enumerate(ranks):
        messages, untouched, accepted = rank["on_stream_misuse"]
        assert ["some ranks give several batches" in message for message in messages[:2]] == [True, True]
        assert messages[2].startswith("mat1 and mat2" if number == 1 else "rank 1 has failed in its closure")
        assert untouched
        assert accepted


def test_streams_under_ddp_are_refused(ranks):
    for rank in ranks:
        message, untouched, batches = rank["on_stream_under_ddp"]
        assert "not for models under DistributedDataParallel" in message
        assert untouched
        assert batches == 0


def test_nan_on_one_rank_rejects_the_step_on_all(ranks):
    for rank in ranks:
        untouched, accepted, status, accepted_next, raised = rank["on_nan"]
        assert untouched
        assert not accepted
        assert status == "rejected: the loss is not finite"
        assert accepted_next
        assert raised


def test_a_closure_that_fails_on_one_rank_fails_on_all(ranks):
    for number, rank in enumerate(ranks):
        message, accepted_next, unmoved = rank["on_failing_closure"]
        assert message.startswith("RuntimeError: mat1" if number == 1 else "ClosureError: rank 1 has failed")
        assert accepted_next
        assert not unmoved


def test_parameters_that_differ_are_refused(ranks):
    for rank in ranks:
        assert rank["on_other_parameters"].startswith("ValueError: process_group: the parameters of rank 1 are not")


def test_bytes_are_counted(ranks):
    """8 bytes a number: P for gradient, product and direction, one for an inner product, five for a result."""
    P = sum(p.numel() for p in make_model().parameters())
    for rank in ranks:
        num_bytes, messages, products, evaluations = rank["on_bytes"]
        assert (products, evaluations) == (5, 1)
        large = 1 + 5 + 1  # gradient, products, direction
        inner = 9 + 5 * 3  # inner products outside of CG's iterations and in them
        tables = 3  # the weights, the loss, and that at the new point: four numbers each
        assert messages == large + inner + tables + 1
        assert num_bytes == 8 * (large * P + inner + 4 * tables + 5)


def test_buffers_and_unused_parameters_under_ddp(ranks):
    theta, losses, batches = ranks[0]["on_buffers"]
    for rank in ranks:
        assert torch.equal(rank["on_buffers"][0], theta)
        assert rank["on_buffers"][1] == losses
    assert losses[2] < losses[0]
    assert losses[5] < losses[3]
    assert batches == 3


def test_a_rank_that_hangs_is_named_in_time(ranks):
    last = len(ranks) - 1
    for rank in ranks[:-1]:
        message, seconds, untouched = rank["on_hang"]
        assert f": rank {last} did not come to it" in message
        assert seconds < 5.5
        assert untouched


def test_misuse_is_named():
    with pytest.raises(ValueError, match="not initialized"):
        tn.Newton(make_model().parameters(), process_group=tn.DataParallel())
