"""`torchnewton plan`: its table, its picture, and what the prediction must obey."""

from __future__ import annotations

import pytest

from torchnewton.cli import run
from torchnewton.train.display import duration
from torchnewton.train.exchanges import Message, Network, Step
from torchnewton.train.plan import planner
from torchnewton.train.plan_report import Request, fastest, predict

SMALL = ["plan", "--model", "6-8-3", "--batch-size", "32", "--iterations", "3"]


def test_the_command_prints_a_table_and_draws_it(tmp_path, capsys):
    path = tmp_path / "plan.svg"
    assert run([*SMALL, "--ranks", "1,2,16", "--flops", "10", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "6-8-3, 32 samples, 3 CG iterations, 10 Gbit/s, 50 µs" in out
    assert all(mode in out for mode in ("exact", "diagonalized", "quorum", "partitioned"))
    assert out.count("fastest") == 3
    assert path.read_text().startswith("<?xml")


def test_models_of_train_are_planned_with_their_task(capsys):
    command = ["plan", "--model", "cnn", "--data", "digits", "--batch-size", "16", "--ranks", "1,4"]
    assert run([*command, "--iterations", "2"]) == 0
    out = capsys.readouterr().out
    assert "cnn on digits" in out
    assert "partitioned" not in out  # which cuts linear layers alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "cnn"], "--model cnn needs --data"),
        (["--ranks", "2,x"], "--ranks x: give whole numbers"),
        (["--ranks", "1.5"], "--ranks 1.5: give whole numbers"),
        (["--flops", "fast"], "--flops fast: give a positive number, or auto"),
        (["--bandwidth", "0"], "--bandwidth must be positive"),
        (["--latency", "-1"], "--latency must not be negative"),
        (["--bandwidth", "1e9"], "--bandwidth 1e+09: it is in Gbit/s, at most 10,000"),
        (["--latency", "1e-4"], "--latency 0.0001: it is in µs, at least 0.01, or 0"),
    ],
)
def test_misuse_is_named(options, message, capsys):
    assert run(["plan", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "title"),
    [
        (["--bandwidth", "10000", "--latency", "0.01"], "10000 Gbit/s, 0.01 µs"),
        (["--bandwidth", "0.001", "--latency", "0"], "0.001 Gbit/s, 0 µs"),
    ],
)
def test_all_networks_there_are_can_be_given(options, title, capsys):
    assert run([*SMALL, "--ranks", "1,2", "--flops", "10", *options]) == 0
    assert title in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (1.234e-9, "0.00123 µs"),
        (9.996e-4, "1.00 ms"),
        (9.994e-4, "999 µs"),
        (0.9996, "1.00 s"),
        (0.01234, "12.3 ms"),
        (123456.0, "123,000 s"),
    ],
)
def test_times_have_three_digits_and_a_fitting_unit(seconds, text):
    assert duration(seconds) == text


def test_messages_take_the_time_of_their_algorithms():
    network = Network(bandwidth=1e6, latency=1e-3)
    by_kind = {kind: network.seconds(Message(kind, 4000, 2, 4)) for kind in ("sum", "gather", "first", "ask")}
    # 4 ms for all bytes: six rounds with a quarter of them, three rounds, two levels, there and back
    expected = {"sum": 2 * 6 * 2e-3, "gather": 2 * 3 * 5e-3, "first": 2 * 2 * 5e-3, "ask": 2 * 2e-3}
    assert by_kind == pytest.approx(expected)
    assert network.seconds(Message("sum", 4000, 2, 1)) == 0


def test_computing_shrinks_with_the_ranks_and_the_slow_rank_is_waited_for():
    step = Step(0, iterations=10, num_samples=256)
    network = Network(1e9, 1e-5)
    plan, slow = (planner("20-30-4", None, step, network, 1e10, factor) for factor in (1.0, 10.0))
    for mode in plan.modes:
        computing = [plan.row(mode, ranks).computing for ranks in (2, 4, 8)]
        assert computing == sorted(computing, reverse=True)
    ratio = {mode: slow.row(mode, 4).computing / plan.row(mode, 4).computing for mode in ("exact", "quorum")}
    assert ratio["exact"] > 4
    assert 1 < ratio["quorum"] < ratio["exact"] / 2
    assert slow.row("exact", 1) == plan.row("exact", 1)


def test_a_faster_machine_computes_less_and_a_slower_network_exchanges_more():
    request = {"model": "20-30-4", "batch_size": 64, "iterations": 4, "ranks": "1,8"}
    one = predict(Request(**request, flops="1"))
    two = predict(Request(**request, flops="2", bandwidth=1.0, latency=500.0))
    for a, b in zip(one, two, strict=True):
        assert b.computing == pytest.approx(a.computing / 2)
        assert (b.exchanging > a.exchanging) == (a.ranks > 1)
        assert (a.num_bytes, a.messages) == (b.num_bytes, b.messages)
    assert fastest(one)[1].mode == "exact"


def test_without_a_rate_gradients_are_timed_here():
    rows = predict(Request("6-8-3", batch_size=64, ranks="1", iterations=3))
    assert 0 < rows[0].computing < 1
