"""Ranks whose closures use other layers, losses or no samples at all make the same step, of all they have."""

from __future__ import annotations

import pytest
import torch
from ranks import launch
from reference import assert_close
from structure_cases import CASES, another_loss, fisher_steps, make_net


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("structure_cases", 2, tmp_path_factory)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_same_on_all_ranks(name, ranks):
    (steps, loss, theta), other = (rank["on_steps"][name] for rank in ranks)
    assert not any("Error" in status for status, _ in steps)
    assert {regime for _, regime in steps} == {"plane", "exact"}
    assert (steps, loss) == other[:2]
    assert torch.equal(theta, other[2])


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_the_same_on_all_ranks(name, ranks):
    one, other = (rank["on_statistics"][name] for rank in ranks)
    assert list(one["blocks"]) == list(other["blocks"])
    assert torch.equal(one["all"], other["all"])
    assert torch.equal(one["state"], other["state"])
    assert one["noise"] == other["noise"] > 0


@pytest.mark.parametrize("name", ["no samples", "own expert", "no negative inputs"])
def test_blocks_of_some_ranks_are_weighted_as_the_loss(name, ranks):
    """Traces, which do not depend on the random numbers: squared errors, and one rank that has all of a block."""
    found = [rank["on_statistics"][name] for rank in ranks]
    if name == "own expert":
        for number, keys in ((0, slice(0, 15)), (1, slice(15, 30))):
            one = found[number]
            trace = one["own"][keys, keys].trace() * one["weight"]
            assert float(found[0]["all"][keys, keys].trace()) == pytest.approx(float(trace))
    elif name == "no samples":
        assert_close(found[0]["blocks"][0, 1][1], found[1]["blocks"][0, 1][1])
        assert float(found[0]["all"].trace()) == pytest.approx(float(found[0]["own"].trace()), rel=0.3)
    else:
        left, _ = found[0]["blocks"][0,]
        assert float(left) == found[1]["weight"]


def test_parameters_in_other_blocks_get_diagonals(ranks):
    for rank in ranks:
        blocks = rank["on_statistics"]["other use"]["blocks"]
        assert set(blocks) == {(0, 1), (2,), (3,)}
        assert [tuple(right.shape) for _, right in blocks.values()] == [(1, 5, 5), (1, 18), (1, 3)]


def test_noise_of_other_losses_counts_them_all(ranks):
    model = make_net()
    loss = sum(float(another_loss(model, rank).detach()) for rank in range(2))
    curvature = 2 * 3 * (20 + 20 + 28)
    assert ranks[0]["on_statistics"]["another loss"]["noise"] == pytest.approx(48 * 4 * loss / curvature)


def test_the_fisher_matrix_of_a_rank_without_samples(ranks):
    for rank in ranks:
        assert_close(rank["on_fisher"], fisher_steps(0))


def test_a_loss_without_a_split_on_one_rank_is_refused_on_all(ranks):
    assert ranks[0]["on_no_split"].startswith("no split of the loss into outputs")
    assert ranks[1]["on_no_split"].startswith("no split of the loss of rank 0")
