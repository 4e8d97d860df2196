"""What a closure returns, a mean or a sum, is seen from the weights of its losses."""

from __future__ import annotations

import pytest
from ranks import launch
from reduction_cases import LOSSES, MIXED, make_batch, make_model, steps
from reference import assert_close


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("reduction_cases", 2, tmp_path_factory)


@pytest.mark.parametrize("name", LOSSES)
def test_steps_are_those_of_one_process(name, ranks):
    theta, loss = steps(LOSSES[name], None)
    for rank in ranks:
        found, reported = rank["on_losses"][name]
        assert_close(found, theta)
        assert reported == pytest.approx(loss)


@pytest.mark.parametrize("name", MIXED)
def test_what_cannot_be_told_is_refused_on_all_ranks(name, ranks):
    for rank in ranks:
        messages, _ = rank["on_mixed_losses"]
        assert all("say process_group=tn.DataParallel(summed=" in message for message in messages[name])


def test_an_argument_tells(ranks):
    theta, _ = steps(MIXED["unknown factor"], None)
    for rank in ranks:
        assert_close(rank["on_mixed_losses"][1][0], theta)


def test_a_rank_with_one_sample_does_as_the_others(ranks):
    model, (x, y) = make_model(), make_batch()
    for rank in ranks:
        for name, loss in rank["on_one_sample"].items():
            assert loss == pytest.approx(float(LOSSES[name](model, x, y).detach()))


def test_a_number_of_samples_is_that_of_the_closure(ranks):
    assert [rank["on_counts"] for rank in ranks] == [0.0, 0.0]
