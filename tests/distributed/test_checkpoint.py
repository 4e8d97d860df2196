"""Checkpoints of `torch.distributed.checkpoint`: saved on four ranks, continued on two and in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_cases import AFTER, BEFORE, NEWTONS, build, flagship_in_the_plane, load, save, steps
from ranks import launch
from reference import assert_close
from shard_cases import whole_of

import torchnewton as tn

# torch says so whenever it saves or loads without processes
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

PRECISION = {"plane": 1e-8, "default": 1e-8}  # whose λ comes from ratios of small differences


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch("checkpoint_cases", 4, tmp_path_factory, only=("on_saving",))


@pytest.fixture(scope="module")
def two(four, tmp_path_factory):
    return launch("checkpoint_cases", 2, tmp_path_factory, only=("on_going_on",))


@pytest.mark.parametrize("name", NEWTONS)
@pytest.mark.parametrize("kind", ["parts", "copies"])
def test_two_ranks_go_on_where_four_have_saved(name, kind, four, two):
    expected, _ = four[0]["on_saving"][name, kind]
    for rank in two:
        found = rank["on_going_on"][name, kind, kind]
        assert torch.equal(found, two[0]["on_going_on"][name, kind, kind])
        assert_close(found, expected, PRECISION.get(name, 1e-10))


def test_copies_become_parts_and_parts_copies(four, two):
    for kind, stored in (("parts", "copies"), ("copies", "parts")):
        expected, _ = four[0]["on_saving"]["cg", stored]
        assert_close(two[0]["on_going_on"]["cg", kind, stored], expected)


@pytest.mark.parametrize("name", NEWTONS)
@pytest.mark.parametrize("stored", ["parts", "copies"])
def test_one_process_goes_on(name, stored, four):
    expected, folder = four[0]["on_saving"][name, stored]
    model, optimizer = build(NEWTONS[name], "alone")
    load(model, optimizer, Path(folder))
    assert_close(
        steps(model, optimizer, range(BEFORE, BEFORE + AFTER), lambda batch: batch),
        expected,
        PRECISION.get(name, 1e-10),
    )


OTHERS = {
    "entropy": partial(tn.EntropySGD, inner_steps=2),
    "entropy, no momentum": partial(tn.EntropySGD, inner_steps=2, momentum=0.0),
    "delayed": partial(tn.DCASGD, delay=3, adaptive=True, momentum=0.9),
    "newton": partial(tn.Newton, momentum=0.5),
}


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_go_on_bit_for_bit(name, after, tmp_path):
    """Also from before the first step, and where the first parameter is frozen."""
    model, optimizer = build(OTHERS[name], "alone")
    steps(model, optimizer, range(after), lambda batch: batch)
    save(model, optimizer, tmp_path)
    state = torch.get_rng_state()
    expected = steps(model, optimizer, range(after, 5), lambda batch: batch)
    model, optimizer = build(OTHERS[name], "alone")
    load(model, optimizer, tmp_path)
    torch.set_rng_state(state)
    found = steps(model, optimizer, range(after, 5), lambda batch: batch)
    assert torch.equal(found, expected)


def test_what_glides_goes_on_gliding(tmp_path):
    """Between full steps, with what is remembered of the steps before."""
    model, optimizer = build(flagship_in_the_plane, "alone")
    steps(model, optimizer, range(24), lambda batch: batch)
    while optimizer.state_dict()["state"][1]["glide"]["left"] == 0:
        steps(model, optimizer, range(1), lambda batch: batch)
    save(model, optimizer, tmp_path)
    state = torch.get_rng_state()
    expected = steps(model, optimizer, range(3), lambda batch: batch)
    model, optimizer = build(flagship_in_the_plane, "alone")
    load(model, optimizer, tmp_path)
    torch.set_rng_state(state)
    steps(model, optimizer, range(1), lambda batch: batch)
    assert optimizer.report.solver == "heavy ball"
    assert torch.equal(steps(model, optimizer, range(1, 3), lambda batch: batch), expected)


def test_a_place_for_nothing_stays_nothing(tmp_path):
    """The zeros that stand for a last step that was not made are none after loading."""
    model, optimizer = build(tn.Newton, "alone")
    before = whole_of(model)
    save(model, optimizer, tmp_path)
    assert not any("last_step" in state for state in optimizer.state.values())
    model, optimizer = build(tn.Newton, "alone")
    load(model, optimizer, tmp_path)
    assert torch.equal(whole_of(model), before)
    assert not any("last_step" in state for state in optimizer.state.values())
    assert optimizer.state_dict()["state"][1]["damping"] == optimizer.damping.start()
