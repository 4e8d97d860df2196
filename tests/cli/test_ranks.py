"""One run in several processes, and what is left of it when one of them is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from torchnewton.cli import run
from torchnewton.train.errors import UsageError
from torchnewton.train.ranks import Ranks

SETTINGS = ["--data", "sine", "--model", "mlp:8", "--method", "hessian-free", "--batch-size", "1750", "--epochs", "3"]


def losses(folder: Path) -> list[tuple[int, float]]:
    """Step and training loss of every record."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["train_loss"]) for record in records]


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path):
    """The run goes on from there and ends as one that was not disturbed, which is that of one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", Path(__file__).with_name("killed.py"), "train", *SETTINGS]
    done = subprocess.run([*command, "--out", tmp_path / "two"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr or "exitcode: -9" in done.stderr
    assert run(["train", *SETTINGS, "--out", str(tmp_path / "one")]) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in two] == [step for step, _ in one] == [0, 4, 8, 12]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["settings"]["ranks"] == 2


def test_misuse_is_named(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run(["train", "--device", "cuda"]) == 2
    assert "several ranks run on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "newton-cg", "--quorum", "0.5"], "--quorum is for distributed-newton"),
        (["--method", "adam", "--quorum", "0.5"], "--quorum is for distributed-newton"),
        (["--method", "distributed-newton", "--quorum", "1.5"], "--quorum is 1.5: it has to be above 0 and at most 1"),
    ],
)
def test_a_quorum_is_for_solves_of_each_rank(options, message, capsys):
    assert run(["train", *options]) == 2
    assert message in capsys.readouterr().err


def test_first_order_methods_run_in_one_process():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    Ranks().give(optimizer, "sgd")
    with pytest.raises(UsageError, match="sgd runs in one process"):
        Ranks(0, 2, Mock()).give(optimizer, "sgd")


def test_the_command_launches_torchrun(monkeypatch, tmp_path):
    """With a folder to continue from, a failed run is started anew."""
    launched = []
    monkeypatch.setattr("torchnewton.cli.launch", lambda *arguments: launched.append(arguments) or 0)
    monkeypatch.setattr(sys, "argv", ["torchnewton", "train", "--ranks", "4"])
    assert run(["train", "--ranks", "4"]) == 0
    assert run(["train", "--ranks", "4", "--out", str(tmp_path / "new")]) == 0
    assert launched == [(["train", "--ranks", "4"], 4, 0), (["train", "--ranks", "4"], 4, 3)]
