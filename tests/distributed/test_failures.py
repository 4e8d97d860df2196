"""An exception on one rank is one on all, and leaves all of them alike."""

from __future__ import annotations

import pytest
import torch
from ranks import launch

BOOM, ELSEWHERE = "RuntimeError: boom", "ClosureError: rank 1 has failed in its closure"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("failure_cases", 2, tmp_path_factory)


@pytest.mark.parametrize("place", [2, 4, "product"])
def test_an_exception_anywhere_in_a_step_undoes_it_everywhere(place, ranks):
    (said, *one), (said_there, *other) = (rank["on_failures"][place] for rank in ranks)
    assert said.startswith(ELSEWHERE)
    assert said_there == BOOM
    for unmoved, *_ in (one, other):
        assert unmoved
    assert one[1] is other[1] is (place != "product")  # the regime
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("number", [0, 1])
def test_ranks_go_on_together(number, ranks):
    one, other = (rank["on_other_courses"][number] for rank in ranks)
    assert "boom" not in one[0] + other[0]
    assert one[0] == other[0]
    assert one[1:3] == other[1:3]
    assert torch.equal(one[3], other[3])


def test_a_point_outside_of_the_domain_of_one_rank(ranks):
    one, other = (rank["on_left_domain"] for rank in ranks)
    assert one[0] == other[0] > 0
    assert "Error" not in one[1] + other[1]
    assert one[2] == other[2] == 0
    assert torch.equal(one[3], other[3])


def test_the_first_step_under_ddp(ranks):
    (said, *one), (said_there, *other) = (rank["on_first_step_under_ddp"] for rank in ranks)
    assert said.startswith(ELSEWHERE)
    assert said_there == BOOM
    assert one[0]
    assert other[0]
    assert torch.equal(one[1], other[1])
