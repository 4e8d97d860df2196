"""Copies of optimizers with a process group, ranks that start apart, and Entropy-SGD on several processes."""

from __future__ import annotations

import pytest
import torch
from ranks import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("copy_cases", 2, tmp_path_factory)


@pytest.mark.parametrize("name", ["newton", "secant"])
def test_copies_share_the_group_and_pickles_are_refused(name, ranks):
    for rank in ranks:
        equal, message = rank["on_copies"][name]
        assert equal
        assert "save its state_dict()" in message


def test_parameters_in_another_order_are_refused(ranks):
    for rank in ranks:
        messages = rank["on_other_starts"]
        assert len(messages) == 2
        assert all("the parameters of rank 1 are not those of rank 0" in message for message in messages)


def test_the_noise_of_a_chain_is_the_same_on_all_ranks(ranks):
    assert torch.equal(ranks[0]["on_noise"], ranks[1]["on_noise"])


def test_a_chain_that_fails_on_one_rank_fails_on_all(ranks):
    for rank in ranks:
        status, untouched, accepted_next, after = rank["on_failed_chain"]
        assert status == "rejected: the loss is not finite"
        assert untouched
        assert accepted_next
        assert torch.equal(after, ranks[0]["on_failed_chain"][3])
