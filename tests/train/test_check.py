"""The pre-flight: passes on the library's tasks, fails on a loss that is not what it seems."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchnewton.cli import run as run_command
from torchnewton.train.check import Row, check
from torchnewton.train.runs import Settings, make_run


def rows(**settings: object) -> dict[str, Row]:
    return {row.name: row for row in check(make_run(Settings(**settings))[1])}


@pytest.mark.parametrize("data", ["digits", "sine"])
def test_the_tasks_pass(data):
    found = rows(data=data, batch_size=32, method="adam")
    assert not [row for row in found.values() if row.passed is False]
    assert found["Hv: complex step and autograd"].passed
    assert found["G is positive semidefinite"].passed
    assert found["Gv: layer factors and autograd"].passed
    assert "100% of the parameters" in found["explicit layer factors"].value
    assert "batch 32" in found["size"].value


class Forgetful(nn.Module):
    """Another result at each call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) * self.calls


def test_a_closure_that_changes_fails():
    _, run = make_run(Settings(data="sine", model="mlp:4", method="sgd"))
    run.model = Forgetful(run.model)
    found = {row.name: row for row in check(run)}
    assert found["the closure gives the same loss and gradient again"].passed is False
    assert [row for row in found.values() if row.passed is False and "every call of the closure" in row.value]


def test_a_gradient_of_zero_divides_nothing():
    _, run = make_run(Settings(data="sine", model="linear", method="sgd"))
    for parameter in run.model.parameters():
        torch.nn.init.zeros_(parameter)
    run.data.y_train.zero_()
    assert not [row for row in check(run) if row.passed is False]


def test_the_command_prints_a_table_and_its_exit_code(capsys, monkeypatch):
    arguments = ["check", "--data", "sine", "--model", "mlp:4", "--method", "sgd"]
    assert run_command(arguments) == 0
    out, _ = capsys.readouterr()
    assert "All checks passed." in out
    assert "time of a step" in out
    monkeypatch.setattr("torchnewton.cli.check", lambda run: [Row("gᵀv", "off", False)])
    assert run_command(arguments) == 1
    out, _ = capsys.readouterr()
    assert "Checks that failed: 1." in out
    assert "FAIL" in out


def test_a_wrong_argument_is_one_sentence(capsys):
    assert run_command(["check", "--model", "x"]) == 2
    assert "Unknown model 'x'" in capsys.readouterr().err
