"""Layers cut over two ranks make the steps of whole ones."""

from __future__ import annotations

import pytest
import torch
from ranks import launch
from reference import assert_close
from tensor_parallel_cases import METHODS, make_model, train


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("tensor_parallel_cases", 2, tmp_path_factory)


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_are_those_of_one_process(name, ranks):
    expected, steps = train(METHODS[name], make_model())
    for rank in ranks:
        theta, found, kinds = rank["on_layers_cut"][name]
        assert kinds.count("DTensor") >= 3
        assert torch.equal(theta, ranks[0]["on_layers_cut"][name][0])
        assert_close(theta, expected)
        assert [iterations for _, iterations in found] == [iterations for _, iterations in steps]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in steps], rel=1e-10)


def test_samples_and_layers_are_not_cut_together(ranks):
    for rank in ranks:
        assert rank["on_samples_cut_too"].startswith("ValueError: process_group: parameters that are DTensors")


def test_the_flagship_finds_a_solver(ranks):
    losses, solver = ranks[0]["on_default"]
    assert ranks[1]["on_default"][0] == losses
    assert solver.startswith("CG")
    assert losses[-1] < 0.7 * losses[0]
