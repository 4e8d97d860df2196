"""`torchnewton spectrum` on tiny runs, and `train --until-loss`, which brings runs to the same loss."""

import json
import shutil

import pytest
import torch

from torchnewton.cli import run
from torchnewton.train.checkpoint import RunFolder

FILES = set(RunFolder.SPECTRUM_FILES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs on sine: two seeds of sgd and one of newton."""
    folder = tmp_path_factory.mktemp("runs")
    for method, seed in (("sgd", 0), ("sgd", 1), ("newton", 0)):
        args = ["train", "--data", "sine", "--model", "mlp:4", "--method", method, "--seed", str(seed), "--epochs", "1"]
        assert run([*args, "--out", str(folder / f"{method}-{seed}")]) == 0
    return folder


@pytest.fixture(autouse=True)
def _beside_copies_of_the_runs(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_one_run_gets_its_spectrum_in_its_folder(tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in (tmp_path / "sgd-0").iterdir()}
    assert run(["spectrum", "sgd-0", "--samples", "100"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Hessian of the loss over 100 of 7,000 (--samples) training samples" in out
    assert "All eigenvalues of the dense matrix" in out
    assert all(word in out for word in ("largest λ", "trace", "|λ|<1e-4, %", "Saved in sgd-0: spectrum.json"))
    assert "…" not in out
    assert names(tmp_path / "sgd-0") == set(before) | FILES
    assert all((tmp_path / "sgd-0" / name).read_bytes() == content for name, content in before.items())
    (found,) = json.loads((tmp_path / "sgd-0" / "spectrum.json").read_text())["runs"]
    assert (found["size"], found["samples"], found["is_exact"]) == (13, 100, True)
    assert found["trace"]["value"] == pytest.approx(sum(found["known"]))
    assert len(found["density"]["value"]) == len(found["density"]["grid"])
    assert run(["spectrum", "sgd-0", "--samples", "50"]) == 0


def test_several_runs_stand_side_by_side(tmp_path, capsys):
    args = ["spectrum", "sgd-0", "sgd-1", "newton-0", "--samples", "50", "--curvature", "gauss-newton", "--double"]
    assert run([*args, "--out", "all"]) == 0
    out = capsys.readouterr().out
    assert "Gauss-Newton matrix of the loss" in out
    assert "float64" in out
    assert "sgd     mean" in out
    assert "newton  mean" not in out
    assert names(tmp_path / "all") == FILES
    assert (tmp_path / "all" / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "all" / "spectrum.svg").read_text()
    found = json.loads((tmp_path / "all" / "spectrum.json").read_text())["runs"]
    assert [r["settings"]["method"] for r in found] == ["sgd", "sgd", "newton"]
    assert all(min(r["known"]) > -1e-6 for r in found)
    assert run([*args[:3], "--samples", "9"]) == 0
    assert names(tmp_path / "runs" / "spectrum-1") == FILES


def test_the_stochastic_road_tells_its_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torchnewton.analysis.spectral.EXACT_SIZE", 0)
    args = ["spectrum", "newton-0", "--samples", "50", "--probes", "2", "--iterations", "5"]
    for _ in range(2):
        assert run([*args]) == 0
    out = capsys.readouterr().out
    assert "2 probes of 5 Lanczos iterations" in out
    assert "With half of the iterations" in out
    assert "±" in out
    (found,) = json.loads((tmp_path / "newton-0" / "spectrum.json").read_text())["runs"]
    assert [len(p["nodes"]) for p in found["probes"]] == [5, 5]


def test_a_new_run_in_the_folder_drops_the_old_spectrum(tmp_path):
    assert run(["spectrum", "sgd-0", "--samples", "9"]) == 0
    args = ["train", "--data", "sine", "--model", "mlp:4", "--method", "sgd", "--epochs", "1", "--out", "sgd-0"]
    assert run([*args, "--overwrite"]) == 0
    assert not names(tmp_path / "sgd-0") & FILES


def test_ctrl_c_writes_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("torchnewton.cli.look_at", interrupted)
    assert run(["spectrum", "sgd-0"]) == 130
    assert "nothing was written" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


WRONG = {
    "no folder": (["nowhere"], "No run in nowhere: config.json is missing"),
    "no checkpoint": (["empty"], "No run in empty: checkpoint.pt is missing"),
    "diverged": (["diverged"], "has diverged"),
    "curvature": (["sgd-0", "--curvature", "x"], "Unknown curvature 'x': choose from hessian, gauss-newton"),
    "samples": (["sgd-0", "--samples", "0"], "--samples is 0"),
    "probes": (["sgd-0", "--probes", "1"], "--probes is 1: it has to be at least 2"),
    "iterations": (["sgd-0", "--iterations", "1"], "--iterations is 1"),
    "out is full": (["sgd-0", "--out", "sgd-1"], "not empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_sentence_and_writes_nothing(name, tmp_path, capsys):
    shutil.copytree("sgd-0", "empty")
    (tmp_path / "empty" / "checkpoint.pt").unlink()
    shutil.copytree("sgd-0", "diverged")
    state = torch.load("diverged/checkpoint.pt")
    next(iter(state["model"].values())).fill_(torch.nan)
    torch.save(state, "diverged/checkpoint.pt")
    before = sorted(tmp_path.rglob("*"))
    arguments, sentence = WRONG[name]
    assert run(["spectrum", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", ["sgd", "newton"])
def test_training_that_begins_below_the_loss_keeps_its_steps(tmp_path, method):
    args = ["train", "--data", "digits", "--model", "linear", "--method", method, "--out", "run"]
    assert run([*args, "--until-loss", "100"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["train_loss"] < records[0]["train_loss"] < 100


@pytest.mark.parametrize("method", ["sgd", "newton"])
def test_training_stops_at_a_loss(tmp_path, capsys, method):
    args = ["train", "--data", "digits", "--model", "linear", "--method", method, "--out", "run"]
    assert run([*args, "--until-loss", "0.5"]) == 0
    assert "training loss reached after" in capsys.readouterr().out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.45 < last["train_loss"] <= 0.5
    assert last["train_loss"] == pytest.approx(0.5, abs=1e-3 if method == "newton" else 0.05)
    assert run(["train", "--resume", "run"]) == 2
    assert "give a smaller --until-loss" in capsys.readouterr().err
    assert run(["train", "--resume", "run", "--until-loss", "0.4"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["until_loss"] == 0.4


def test_a_loss_that_is_not_reached_is_told(capsys):
    args = ["train", "--data", "digits", "--model", "linear", "--method", "sgd", "--epochs", "1", "--out", "run"]
    assert run([*args, "--until-loss", "1e-9"]) == 0
    assert "did not reach 1e-09" in capsys.readouterr().out
    assert run(["train", "--until-loss", "-1"]) == 2
    assert "--until-loss is -1" in capsys.readouterr().err
