"""Training continues bit for bit in a new process, and 300 steps do not grow memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods import LONG_RUNS, METHODS, differences, make_model, train

WORKER = Path(__file__).with_name("worker.py")


def run(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-W", "error", WORKER, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    checkpoint = {}
    for name, method in METHODS.items():
        model = make_model()
        optimizer = method(model.parameters())
        train(model, optimizer, 0, 5)
        checkpoint[name] = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
    torch.save(checkpoint, folder / "checkpoint.pt")
    run("resume", folder / "checkpoint.pt", folder / "result.pt")
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_are_five_and_five_in_a_new_process(name, resumed):
    model = make_model()
    optimizer = METHODS[name](model.parameters())
    losses = train(model, optimizer, 0, 10)
    assert resumed[name]["losses"] == losses[5:]
    assert resumed[name]["damping"] == optimizer.report.damping
    assert differences(resumed[name]["model"], model.state_dict()) == []


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    result = tmp_path_factory.mktemp("memory") / "counts.json"
    run("memory", result)
    return json.loads(result.read_text())


@pytest.mark.parametrize("name", LONG_RUNS)
def test_300_steps_do_not_grow_memory(name, memory):
    """A step keeps no tensor, where its graph alone would be 60 kB a step."""
    (tensors, peak), (tensors_later, peak_later) = memory[name]
    assert tensors_later == tensors
    assert peak_later - peak < 3e6
