"""What the command line refuses, and what it prints and writes where something goes wrong."""

import json
import math
import os
import signal
import sys
from contextlib import nullcontext
from io import BytesIO, TextIOWrapper
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.table import Table
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from torchnewton.cli import _console, _show, run
from torchnewton.train import loop, ranks, runs
from torchnewton.train.compare import Result
from torchnewton.train.display import summary
from torchnewton.train.errors import UsageError
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
    "no room": ([*SINE, "--model", "mlp:9999999-9999999"], "Memory is too small"),
    "no sizes": ([*SINE, "--model", "mlp:99999999999999999999"], "write the hidden sizes as"),
    "system folder": ([*SINE, "--out", "/proc/run"], "/proc/run cannot be written"),
    "long name": ([*SINE, "--out", "x" * 999], "cannot be written: File name too long"),
    "compare out": (["compare", "--out", "/proc/run"], "/proc/run cannot be written"),
    "plan ranks": (["plan", "--ranks", "1e30"], "--ranks 1e30: give whole numbers from 1 to 1,000,000"),
    "plan many ranks": (["plan", "--ranks", "1" * 30], "give whole numbers"),
    "plan no rank": (["plan", "--ranks", "1,,2"], "--ranks 1,,2: give whole numbers"),
    "plan latency": (["plan", "--latency", "inf"], "--latency inf: it is in µs, at most"),
    "plan slow": (["plan", "--slow", "inf"], "--slow inf: give a number from 1"),
    "plan threads": (["plan", "--threads", "0"], "--threads is 0"),
    "plan flops": (["plan", "--flops", "1e-300"], "--flops 1e-300: give a positive number"),
    "plan sizes": (["plan", "--model", "10-99999999999999999999-2"], "needs --data"),
    "plan batch": (["plan", "--batch-size", str(10**15)], "Memory is too small"),
    "plan ending": (["plan", "--out", "plan.txt"], "ends with .svg, .png, .pdf"),
    "plan folder": (["plan", "--out", "nowhere/plan.svg"], "there is no folder nowhere"),
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
    picture = (trained / "spectrum.svg").read_text()
    assert "table:moved.csv" in picture
    assert str(tmp_path) not in picture


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


def test_ranks_of_a_plan_are_sorted_and_told_once(capsys):
    assert (
        run(["plan", "--model", "6-8-3", "--batch-size", "32", "--flops", "10", "--ranks", "8,1,8", "--out", "p.svg"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "fastest" in line] == ["1", "8"]


@pytest.mark.parametrize("name", ["[red]λ:smile:", "x\udcff"])
def test_any_name_is_printed_and_stored(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.csv").write_text(TABLE)
    data = ["--data", f"table:{name}.csv", "--model", "linear"]
    folder, stream = f"{name}[/]run", TextIOWrapper(BytesIO(), encoding="ascii", errors="replace")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "argv", ["torchnewton", *data])
        assert run(["train", *data, *SINE[5:], "--out", folder]) == 0
        few = ["--methods", "sgd", "--seconds", "0.01", "--seeds", "1"]
        assert run(["compare", *data, *few, "--out", "c" + folder]) == 0
        assert run(["train", "--resume", folder, "--epochs", "2"]) == 0
        assert run(["spectrum", folder]) == 0
    stream.seek(0)
    printed = stream.read()
    for out in (folder, "c" + folder):
        assert f"Saved in {out}".encode("ascii", "replace").decode() in printed
    assert json.loads((tmp_path / folder / "config.json").read_text())["settings"]["data"].endswith(f"{name}.csv")


def test_a_full_disk_is_one_sentence_and_leaves_whole_files(tmp_path, capsys):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        assert run([*SINE, "--out", "run"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint.pt cannot be written: File too large" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data", "table:nowhere"], "no file nowhere"),
        (["--method", "adam"], "--ranks is for Newton's methods"),
        (["--out", "/proc/run"], "cannot be written"),
    ],
)
def test_what_every_rank_would_refuse_is_refused_once(options, sentence, capsys):
    assert run(["train", "--ranks", "2", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_the_first_rank_that_ends_tells_how(tmp_path, monkeypatch, capsys):
    """torchrun is told that all is well, so that it does not start anew what ends in the same way."""
    monkeypatch.setenv(ranks.ENDING, str(tmp_path / "ending"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run(["train", "--device", "cuda"]) == 0
    assert ranks.leave(1)
    assert ranks.has_ended()
    assert (tmp_path / "ending").read_text().startswith("2\n--device cuda is for one process")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("ending", "error", "code"),
    [
        (None, None, 0),
        ("1\n", None, 1),
        ("2\na sentence", ChildFailedError("", {1: Mock(timestamp=0)}), "a sentence"),
        (None, ChildFailedError("", {1: Mock(timestamp=0)}), "Rank 1 has failed"),
        (None, SignalException("", signal.SIGINT), 130),
    ],
)
def test_the_launcher_ends_as_the_ranks_do(ending, error, code, monkeypatch):
    def work(*arguments):
        if ending:
            Path(os.environ[ranks.ENDING]).write_text(ending)
        if error:
            raise error

    monkeypatch.setenv(ranks.ENDING, "")
    monkeypatch.setattr(ranks, "elastic_launch", lambda config, command: work)
    with pytest.raises(UsageError, match=code) if isinstance(code, str) else nullcontext():
        assert ranks.launch(["train"], 2, 0) == code


def test_tables_are_as_wide_as_they_are(capsys):
    table = Table(*("a column with a long name" for _ in range(9)))
    table.add_row(*(9 * ["1.234e-05 ± 1.2e-06"]))
    _show(_console(), table)
    assert "…" not in capsys.readouterr().out
