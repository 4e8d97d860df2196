"""What the command line refuses, and what it prints and writes where something goes wrong."""

import json
import math

import pytest
import torch

from torchnewton.cli import run
from torchnewton.train import loop, runs
from torchnewton.train.compare import Result
from torchnewton.train.display import summary
from torchnewton.train.runs import Settings, make_run

SINE = ["train", "--data", "sine", "--model", "mlp:4", "--method", "sgd", "--epochs", "1"]
TABLE = "".join(f"{k / 7:g} {(k % 5) / 3:g}\n" for k in range(40))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(tmp_path):
    """The folder of a run on a table."""
    (tmp_path / "t.csv").write_text(TABLE)
    assert run(["train", "--data", "table:t.csv", "--model", "linear", *SINE[5:], "--out", "run"]) == 0
    return tmp_path / "run"


REFUSED = {
    "meta": ([*SINE, "--device", "meta"], "--device meta is not available"),
    "threads": ([*SINE, "--threads", "1000000"], "--threads is 1000000: it has to be a positive number, at most 1024"),
    "rate": ([*SINE, "--lr", "1e308"], "--lr is 1e+308: it has to be a positive number, at most 1e+30"),
    "epochs": (["train", "--epochs", "1" + "0" * 400], "it has to be a positive number"),
    "ranks": ([*SINE, "--ranks", "100000"], "at most 1024"),
    "spectrum seed": (["spectrum", "run", "--seed", str(2**64)], "--seed is 18446744073709551616"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_one_sentence(name, capsys):
    arguments, sentence = REFUSED[name]
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "0"], "--epochs is 0"),
        (["--seconds", "0"], "--seconds is 0"),
        (["--until-loss", "0"], "--until-loss is 0"),
        (["--epochs", "2", "--seconds", "1"], "not both"),
        (["--epochs", "2", "--data", "sine"], "--data can only say where the file"),
        (["--epochs", "2", "--data", "table:nowhere"], "no file nowhere"),
        (["--epochs", "2", "--device", "meta"], "--device meta is not available"),
        (["--seed", "2"], "--seed cannot change in a resumed run: only --epochs, --seconds, --until-loss, --data,"),
    ],
)
def test_a_resumed_run_refuses_what_a_new_one_does(trained, options, sentence, capsys):
    before = {p.name: p.read_bytes() for p in trained.iterdir()}
    assert run(["train", "--resume", "run", *options]) == 2
    assert sentence in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in trained.iterdir()} == before


def test_a_run_goes_on_where_its_data_and_device_are_now(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    config["settings"]["device"] = "cuda:7"
    (trained / "config.json").write_text(json.dumps(config))
    (tmp_path / "t.csv").rename(tmp_path / "moved.csv")
    options = ["--epochs", "2", "--data", "table:moved.csv", "--device", "cpu", "--threads", "1"]
    assert run(["train", "--resume", "run", *options]) == 0
    settings = json.loads((trained / "config.json").read_text())["settings"]
    assert (settings["data"], settings["device"]) == (f"table:{tmp_path / 'moved.csv'}", "cpu")
    config["settings"]["data"] = settings["data"]
    (trained / "config.json").write_text(json.dumps(config))
    assert run(["spectrum", "run"]) == 2
    assert run(["spectrum", "run", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [("epochs", "3", "'3' in config.json is no value of epochs"), ("colour", 1, "unknown setting colour")],
)
def test_a_stored_setting_of_a_wrong_kind_is_named(trained, name, value, sentence, capsys):
    config = json.loads((trained / "config.json").read_text())
    config["settings"][name] = value
    (trained / "config.json").write_text(json.dumps(config))
    assert run(["train", "--resume", "run"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_diverged_run_shows_no_metric_and_ends_with_1(capsys, monkeypatch):
    monkeypatch.setattr(runs, "make_run", lambda settings: broken(make_run(settings)))
    assert run([*SINE[:2], "digits", *SINE[5:]]) == 1
    out = capsys.readouterr().out
    assert "diverged after" in out
    assert "%" not in out


def broken(made):
    torch.nn.init.constant_(next(made[1].model.parameters()), torch.nan)
    return made


def test_what_diverged_at_once_has_no_best():
    settings, made = broken(make_run(Settings(model="linear")))
    assert math.isnan(Result(settings, "diverged", [loop.evaluate(made)]).best())


def test_one_epoch_is_no_plural():
    _, made = make_run(Settings(model="linear", method="sgd"))
    loop.train(made, loop.Budget(epochs=1))
    assert summary(made, "finished").title == "finished after 1 epoch"
