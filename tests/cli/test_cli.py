"""The command line as a user meets it: outputs, exit codes, and nothing written on an error."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from torchnewton.cli import run
from torchnewton.train.runs import Settings

SINE = ["train", "--data", "sine", "--model", "mlp:4", "--method", "sgd"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def test_train_writes_a_run_folder(tmp_path, capsys):
    assert run([*SINE, "--epochs", "2"]) == 0
    folder = tmp_path / "runs" / "sine-10-mlp-4-sgd-1"
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "curves.png",
    }
    assert [line["epoch"] for line in metrics(folder)] == [0, 1, 2]
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["batch_size"] == 128
    assert config["about"]["parameters"] == 13
    out, err = capsys.readouterr()
    assert err == ""
    assert "test mse" in out
    assert "Saved in runs/sine-10-mlp-4-sgd-1" in out
    assert "\x1b" not in out


def test_train_is_deterministic_for_a_seed(tmp_path):
    for out, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run([*SINE, "--epochs", "1", "--seed", seed, "--out", out]) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


@pytest.mark.parametrize("method", ["newton", "adam"])
def test_resume_equals_one_run(tmp_path, method):
    args = ["train", "--data", "sine", "--model", "mlp:4", "--method", method]
    assert run([*args, "--epochs", "4", "--out", "whole"]) == 0
    assert run([*args, "--epochs", "2", "--out", "parts"]) == 0
    assert run(["train", "--resume", "parts", "--epochs", "4"]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    parts, whole = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("parts", "whole"))
    assert all(torch.equal(parts[key], whole[key]) for key in whole)


def test_a_recipe_with_changes_resumes_and_keeps_the_best_model(tmp_path, capsys):
    recipe = ["--recipe", "simplenn-mnist", "--data", "digits", "--samples", "90", "--test-samples", "50"]
    args = ["train", *recipe, "--validation", "0.2", "--batch-size", "40", "--subset", "0.5"]
    assert run([*args, "--epochs", "4", "--out", "whole"]) == 0
    assert run([*args, "--epochs", "2", "--out", "parts"]) == 0
    assert run(["train", "--resume", "parts", "--epochs", "4"]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())["settings"]
    expected = {"method": "newton-cg", "model": "cnn4", "loss": "squared-error", "C": 0.01, "center": True}
    assert expected.items() <= settings.items()
    assert (settings["data"], settings["subset"], settings["epochs"]) == ("digits", 0.5, 4)
    lines = metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(line["validation_accuracy"] is not None for line in lines)
    for name in ("best.pt", "checkpoint.pt"):
        parts, whole = (torch.load(tmp_path / folder / name) for folder in ("parts", "whole"))
        parts, whole = (state.get("model", state) for state in (parts, whole))
        assert all(torch.equal(parts[key], whole[key]) for key in whole)
    assert "best.pt" in capsys.readouterr().out
    assert run(["train", "--resume", "parts", "--C", "1"]) == 2
    assert "--C cannot change" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "alexnet"], "Unknown recipe 'alexnet': choose from simplenn-mnist"),
        (["--C", "-1"], "--C is -1.0"),
        (["--method", "lbfgs", "--C", "1"], "has no weight decay"),
        (["--method", "adam", "--subset", "0.5"], "--subset is for Newton methods"),
        (["--subset", "1.5"], "at most 1"),
    ],
)
def test_wrong_options_of_a_recipe(options, message, capsys, tmp_path):
    assert run(["train", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_saves_and_the_run_continues(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "torchnewton", *SINE]
    process = subprocess.Popen([*command, "--epochs", "100000", "--out", "run"], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with: torchnewton train --resume run" in out
    step = torch.load(tmp_path / "run" / "checkpoint.pt")["place"]["step"]
    assert run(["train", "--resume", "run", "--epochs", str(step // 54 + 2)]) == 0
    assert len(metrics(tmp_path / "run")) == step // 54 + 3


def test_the_default_run_is_newton_on_digits():
    settings = Settings()
    assert (settings.data, settings.model, settings.method, settings.threads) == (
        "digits",
        "auto",
        "newton",
        1,
    )
    assert settings.budget.epochs == 12


def test_compare_prints_a_table_and_writes_its_files(tmp_path, capsys):
    args = ["compare", "--data", "sine", "--methods", "lbfgs,adam", "--seconds", "0.02", "--seeds", "1"]
    assert run([*args, "--out", "cmp"]) == 0
    assert {p.name for p in (tmp_path / "cmp").iterdir()} == {"compare.json", "compare.html", "compare.png"}
    out, err = capsys.readouterr()
    assert err == ""
    assert all(word in out for word in ("lbfgs", "adam", "rate", "search"))


def test_ctrl_c_in_a_comparison_writes_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchnewton.cli.compare", interrupted)
    assert run(["compare"]) == 130
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


WRONG = {
    "unknown option": (["train", "--foo"], "No such option"),
    "unknown command": (["fly"], "No such command"),
    "no number": (["train", "--epochs", "x"], "valid integer"),
    "unknown data": (["train", "--data", "x"], "Unknown data 'x': choose from digits"),
    "missing data": (["train", "--data", "mnist"], "put train-images-idx3-ubyte.gz"),
    "missing file": (["train", "--data", "table:x.csv"], "no file x.csv"),
    "unknown model": (["train", "--model", "x"], "Unknown model 'x': choose from auto"),
    "unknown method": (["train", "--method", "x"], "Unknown method 'x': choose from newton"),
    "model and data": ([*SINE, "--model", "cnn"], "needs images"),
    "no epochs": (["train", "--epochs", "0"], "--epochs is 0"),
    "no seconds": (["train", "--seconds", "-1"], "--seconds is -1"),
    "endless": (["train", "--seconds", "inf"], "--seconds is inf"),
    "both budgets": (["train", "--seconds", "1", "--epochs", "1"], "not both"),
    "batch size": (["train", "--batch-size", "0"], "--batch-size is 0"),
    "threads": (["train", "--threads", "0"], "--threads is 0"),
    "seed": (["train", "--seed", "-1"], "--seed is -1"),
    "rate for newton": (["train", "--lr", "0.1"], "newton has no rate"),
    "rate": ([*SINE, "--lr", "nan"], "--lr is nan"),
    "device": (["train", "--device", "abacus"], "--device abacus is not available"),
    "out is full": ([*SINE, "--out", "full"], "not empty"),
    "out is a file": ([*SINE, "--out", "full/file"], "is a file"),
    "resume nothing": (["train", "--resume", "nowhere"], "config.json is missing"),
    "resume and more": (["train", "--resume", "full", "--seed", "1"], "--seed cannot change"),
    "compare methods": (["compare", "--methods", "adam,x"], "Unknown method 'x'"),
    "compare seeds": (["compare", "--seeds", "0"], "--seeds is 0"),
    "compare target": (["compare", "--target", "98"], "between 0 and 1"),
    "compare data": (["compare", "--data", "fashion-mnist"], "fashion-mnist files are missing"),
    "compare out": (["compare", "--out", "full"], "not empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_sentence_and_writes_nothing(name, tmp_path, capsys):
    arguments, sentence = WRONG[name]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full"]


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {"colour": 1}}'])
def test_a_broken_config_is_one_sentence(tmp_path, content, capsys):
    (tmp_path / "config.json").write_text(content)
    assert run(["train", "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("No run in")


def test_a_finished_run_needs_a_larger_budget(capsys):
    assert run([*SINE, "--epochs", "1", "--out", "run"]) == 0
    assert run(["train", "--resume", "run"]) == 2
    assert "give a larger --epochs" in capsys.readouterr().err


def test_overwrite_starts_anew(tmp_path):
    for _ in range(2):
        assert run([*SINE, "--epochs", "1", "--out", "run", "--overwrite"]) == 0
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "--help"]])
def test_help(arguments, capsys):
    assert run(arguments) == 0
    assert "torchnewton" in capsys.readouterr().out


def test_without_the_extra_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import torchnewton.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "pip install 'torchnewton[cli]'" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif("TORCHNEWTON_DATA" not in os.environ, reason="TORCHNEWTON_DATA names no folder with MNIST")
def test_mnist_from_its_files(tmp_path):
    args = ["train", "--data", "mnist", "--data-dir", os.environ["TORCHNEWTON_DATA"], "--model", "linear"]
    assert run([*args, "--method", "adam", "--seconds", "1", "--out", "run"]) == 0
    assert metrics(tmp_path / "run")[-1]["test_accuracy"] > 0.85
