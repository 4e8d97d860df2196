"""`torchnewton train` in each mode of several processes."""

from __future__ import annotations

import pytest
import torch
from ranks import launch
from train_cases import MODES, result


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch("train_cases", 2, tmp_path_factory)


@pytest.mark.parametrize("name", MODES)
def test_all_ranks_have_one_model_that_learns(name, two):
    first, second = (rank["on_modes"][name] for rank in two)
    assert first["ranks"] == 2
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["losses"] == second["losses"]
    assert first["losses"][-1] < 0.9 * first["losses"][0]


@pytest.mark.parametrize("name", ["exact, all data", "exact"])
def test_exact_modes_are_those_of_one_process(name, two):
    assert two[0]["on_modes"][name]["losses"] == pytest.approx(result(name)["losses"], rel=1e-3)


def test_ranks_solve_for_their_blocks(two):
    for rank in two:
        found = rank["on_modes"]
        assert "2 blocks" not in found["exact"]["solver"]
        for name in ("diagonalized", "quorum"):
            assert "in 2 blocks" in found[name]["solver"]
            assert ", 0 bytes exchanged" in found[name]["solver"] or name == "quorum"
        assert found["diagonalized"]["quorum"] is None
        assert found["quorum"]["quorum"].share == 0.5
