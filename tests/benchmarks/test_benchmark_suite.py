"""The suite's arithmetic on made-up runs: profiles, duels, verdicts, stop rule, batches; no timings."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import torchnewton as tn
from benchmarks.suite import measure, networks, report, summary
from benchmarks.suite.criteria import _newton_cg_moves, _wins
from benchmarks.suite.measure import Point
from benchmarks.suite.methods import first_order, lbfgs, newton, newton_cg, sgd
from benchmarks.suite.problems import Poisson, Supervised, Training
from benchmarks.suite.profiles import profile, ratios
from benchmarks.suite.rows import Row, collect, key_of
from benchmarks.suite.runs import names_longest_first, run_task
from benchmarks.suite.sensitivity import variations
from benchmarks.suite.store import Key, Run, Store
from benchmarks.suite.task import Budget, Entry, Task
from benchmarks.suite.tasks import TASKS
from torchnewton.train.data import Dataset

ABOUT = {"date": "2026-01-01", "cpu": "none", "python": "3", "torch": "2", "torchnewton": "0"}
FIRST_ORDER = first_order(10)
TASK = Task(
    "made-up",
    "Numbers.",
    "test MSE",
    targets=(1e-2,),
    seconds=1,
    search_seconds=1,
    search_limit=2,
    limit=8,
    samples=100,
    published="none",
    problem=lambda folder: None,
    entries=(newton(50), *FIRST_ORDER),
)


def run(key, *points, status="finished"):
    """A run from (seconds, gradients, value)."""
    return Run(key, status, [Point(s, i, g, v) for i, (s, g, v) in enumerate(((0.0, 0.0, 1.0), *points))], ABOUT)


def row(entry, *points, task=TASK, seeds=1):
    return Row(task, entry, entry.rates[0] if entry.rates else None, [run(None, *points)] * seeds)


def test_performance_profile_of_hand_made_numbers():
    found = ratios(
        {
            "a": {"x": 1.0, "y": 4.0},
            "b": {"x": 6.0, "y": 2.0},
            "c": {"x": math.inf, "y": math.inf},  # solved by nobody
            "d": {"y": 5.0},  # x was not run
        }
    )
    assert found == {"x": [1, 3, math.inf, math.inf], "y": [4, 1, math.inf, 1]}
    assert [profile(found["x"], tau) for tau in (1, 2.9, 3, 100)] == [0.25, 0.25, 0.5, 0.5]
    assert [profile(found["y"], tau) for tau in (1, 4)] == [0.5, 0.75]


def test_passes_are_gradients_times_the_batch_over_the_samples():
    mine = row(newton(50), (1.0, 20.0, 1.0), (2.0, 30.0, 1e-3))
    assert (mine.median_seconds(1e-2), mine.median_passes(1e-2)) == (2.0, 15.0)
    assert row(newton(None), (2.0, 30.0, 1e-3)).median_passes(1e-2) == 30.0
    assert math.isinf(row(newton(50), (2.0, 30.0, 1.0)).median_passes(1e-2))
    assert row(newton(50), (2.0, 30.0, 1.0)).passes_bound(1e-2) == 15.0


def test_profiles_take_the_better_of_two_batches_of_lbfgs():
    rows = {"made-up": [row(lbfgs(None), (5.0, 3.0, 1e-3)), row(lbfgs(50), (2.0, 8.0, 1e-3))]}
    assert summary.costs(rows, passes=False) == {"made-up": {"lbfgs": 2.0}}
    assert summary.costs(rows, passes=True) == {"made-up": {"lbfgs": 3.0}}
    assert summary.labels(rows) == {"lbfgs": "L-BFGS"}


def test_the_rival_is_the_first_order_method_that_is_soonest():
    rows = [row(newton(50), (2.0, 30.0, 1e-3))]
    rows += [row(entry, (t, 100.0 * t, 1e-3)) for entry, t in zip(FIRST_ORDER, (5.0, 4.0, 6.0, 7.0), strict=True)]
    time, work = summary.by_seconds(rows), summary.by_passes(rows)
    assert (time.ratio, time.text, time.winner, time.loss) == (2.0, "2.00", "Newton", 0.0)
    assert time.name == "Adam, rate 0.0003"
    assert (work.newton, work.rival, work.is_won) == (15.0, 40.0, True)
    line = summary.summary_table({"made-up": rows}).splitlines()[-1]
    assert "| 2.00 | Adam, rate 0.0003 | 4.00 | 2.00 | Newton |" in line


@pytest.mark.parametrize(
    ("mine", "theirs", "text", "winner", "loss"),
    [
        ((2.0, 1e-3), (8.0, 1.0), "> 4.00", "Newton", 0.0),  # it did not arrive in 8 s
        ((8.0, 1.0), (2.0, 1e-3), "< 0.25", "Adam", math.inf),
        ((8.0, 1.0), (8.0, 1.0), "–", "–", 0.0),
        ((6.0, 1e-3), (2.0, 1e-3), "0.33", "Adam", 3.0),
    ],
)
def test_a_target_that_is_not_reached(mine, theirs, text, winner, loss):
    rows = [row(newton(50), (mine[0], 1.0, mine[1])), row(FIRST_ORDER[1], (theirs[0], 1.0, theirs[1]))]
    duel = summary.by_seconds(rows)
    assert duel.text == text
    assert duel.winner.split(",")[0] == winner
    assert duel.loss == loss


@pytest.mark.parametrize(("wins", "worst", "holds"), [(8, 2.9, True), (7, 2.9, False), (8, 3.1, False)])
def test_wins_and_worst_loss_decide(wins, worst, holds):
    rows = {}
    for i in range(10):
        time = 1.0 if i < wins else worst
        rows[f"t{i}"] = [
            row(newton(50), (time, 1.0, 1e-3)),
            row(FIRST_ORDER[0], (1.0 if i >= wins else 2.0, 1.0, 1e-3)),
        ]
    verdict = _wins("in time", rows, summary.by_seconds, 10)
    assert verdict.holds is holds
    assert f"on {wins} of 10 tasks" in verdict.sentence
    assert f"{worst:.1f} times" in verdict.sentence
    with pytest.raises(KeyError, match="10 of 11"):
        _wins("in time", rows, summary.by_seconds, 11)


def test_the_moves_of_newton_cg_beside_those_of_sgd():
    task = TASKS["cnn-mnist"]
    rows = [row(newton_cg(weight_decay=0.05), (1.0, 1.0, 0.98), task=task), row(sgd(128), (1.0, 1.0, 0.98), task=task)]
    keys = [key for one in rows for v in variations(one) for _, key in v.runs]
    values = dict.fromkeys(keys, 0.98)
    runs = {key: run(key, (1.0, 1.0, value)) for key, value in values.items()}
    runs = {key: replace(found, points=found.points[1:]) for key, found in runs.items()}
    assert len({key.method for key in keys}) == 8  # SGD, Newton-CG and six with other constants
    verdict = _newton_cg_moves(*rows, runs.get)
    assert verdict.holds
    assert "CG tolerance: 0.00 points" in verdict.sentence
    assert "SGD, momentum 0.9, rate: 0.00 points" in verdict.sentence
    one = next(key for key in keys if key.method == "newton-cg-rtol-0.4")
    runs[one] = replace(runs[one], points=[Point(1.0, 1, 1.0, 0.969)])
    assert not _newton_cg_moves(*rows, runs.get).holds
    del runs[one]
    with pytest.raises(KeyError):
        _newton_cg_moves(*rows, runs.get)


def test_a_run_ends_half_as_long_again_after_its_target(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "process_time", lambda: clock[0])

    def step():
        clock[0] += 0.1
        return 2.0

    def ends(target, seconds=1.0):
        clock[0] = 0.0
        points, status = measure.run(step, lambda: 1 - clock[0] / 10, seconds, 8.0, lambda v: v <= target)
        assert status == "finished"
        assert points[-1].gradients == pytest.approx(2 * points[-1].step)
        return points[-1].seconds

    assert ends(target=-1.0) == pytest.approx(8.0, abs=0.11)
    assert ends(target=0.6) == pytest.approx(6.0, abs=0.3)
    assert ends(target=0.99) == pytest.approx(1.0, abs=0.11)  # the common time at least
    assert ends(target=0.3) == pytest.approx(8.0, abs=0.11)  # the limit at most


def test_a_step_that_fails_is_a_result():
    def step():
        raise RuntimeError("no\nway")

    points, status = measure.run(step, lambda: 1.0, 1.0, 1.0, lambda v: False)
    assert status == "RuntimeError: no way"
    assert len(points) == 1
    values = iter([1.0, math.inf])
    assert measure.run(lambda: 1.0, lambda: next(values), 1.0, 1.0, lambda v: False)[1] == "diverged"


def test_batches_are_full_and_of_one_shuffle_after_another():
    x = torch.arange(10)
    training = Training(nn.Linear(1, 1), (x,), 10, lambda batch: x.sum(), lambda: 0.0, seed=1)
    batches = training.batches(4)
    first = torch.cat([next(batches)[0] for _ in range(2)])
    assert len(first.unique()) == 8
    assert len(next(batches)[0]) == 4
    assert next(training.batches(None))[0] is x


@pytest.mark.parametrize(
    ("network", "shape", "count"),
    [
        (networks.dense(20, activation=nn.Tanh), (1,), 61),
        (networks.small_cnn, (1, 28, 28), 1026),
        (networks.cnn_4layers, (1, 28, 28), 62_026),
        (networks.cnn_4layers, (3, 32, 32), 68_106),
        (networks.named("lenet"), (1, 28, 28), 44_426),
    ],
)
def test_networks_have_the_stated_sizes(network, shape, count):
    x, y = torch.randn(2, *shape), torch.tensor([0, 1])
    kind, classes = ("regression", 0) if shape == (1,) else ("classification", 10)
    targets = x if kind == "regression" else y
    model = network(Dataset("none", kind, x, targets, x, targets, classes))
    assert sum(p.numel() for p in model.parameters()) == count


def test_squared_error_is_that_of_one_hot_targets():
    output, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    expected = (output - torch.eye(3)[y]).square().sum(1).mean()
    torch.testing.assert_close(networks.squared_error(output, y), expected)


def numbers(count=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True))
    return Dataset("numbers", "regression", x, y, x, y)


def test_newton_cg_takes_its_curvature_from_a_part():
    training = Supervised(numbers(), networks.dense(5)).training(0)
    twin = Supervised(numbers(), networks.dense(5)).training(0)
    work = newton_cg(share=0.25).start(training, None, 1.0)()
    optimizer, part = tn.NewtonCG(twin.model.parameters()), next(twin.batches(10))
    optimizer.step(lambda: twin.loss(twin.data), curvature=lambda: twin.loss(part))
    for p, q in zip(training.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
    outside = 1 + optimizer.report.loss_evaluations / 3
    assert work == pytest.approx(outside + (optimizer.report.gradient_equivalents - outside) / 4)
    assert 1 < work < optimizer.report.gradient_equivalents


def small_task():
    return replace(
        TASK,
        entries=(newton(20), sgd(10, (0.01, 0.1))),
        problem=lambda folder: Supervised(numbers(), networks.dense(5)),
        samples=40,
        seconds=0.02,
        search_seconds=0.01,
        search_limit=0.02,
        limit=0.05,
    )


def test_runs_are_kept_and_the_page_comes_from_them(tmp_path):
    task, results = small_task(), tmp_path / "benchmarks/results"
    run_task(task, 2, tmp_path, Store(results))
    kept = (results / "made-up.jsonl").read_text()
    assert len(kept.splitlines()) == 2 + 2 + 2  # searched rates, two seeds of two methods
    run_task(task, 2, tmp_path, Store(results))
    assert (results / "made-up.jsonl").read_text() == kept
    page = report.write([task], 2, tmp_path).read_text(encoding="utf-8")
    best = collect(task, task.entries[0], 2, Store(results).get).mean_best()
    assert "## made-up" in page
    assert "| Newton | 20 | – |" in page
    assert f"{best:.2e}"[:4] in page or f"{best:.4g}" in page
    assert (tmp_path / "docs/figures/profiles.svg").is_file()
    assert (tmp_path / "docs/figures/made-up.svg").is_file()


@pytest.mark.parametrize(("late", "settled"), [((0.4, 0.1, 0.3), 0.3), ((None,), 0.2)])
def test_what_a_curve_is_at_is_not_what_it_touches(late, settled):
    values = (1.0, 0.5, 0.2, *late)
    times = (0.0, 0.1, 0.2, *(2.0 + i / 10 for i in range(len(late))))
    points = [Point(t, i, float(i), v) for i, (t, v) in enumerate(zip(times, values, strict=True))]
    run = Run(Key("made-up", "newton", None, 20, 0, 1.0, 3.0), "finished", points, {})
    assert run.settled == settled


def test_the_modes_of_several_processes_stand_on_the_page(tmp_path):
    assert report.distributed(tmp_path / "distributed.json") == []
    row = {"task": "letter", "mode": "exact", "bytes": 154776.8, "messages": 62.7}
    rows = [
        {**row, "slow rank": False, "loss": 0.25, "seconds": 0.2},
        {**row, "slow rank": True, "loss": 0.26, "seconds": 0.9},
    ]
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    (results / "distributed.json").write_text(json.dumps(rows))
    page = report.write([small_task()], 2, tmp_path).read_text(encoding="utf-8")
    assert "| letter | exact | 0.2500 | 155 | 63 | 0.200 | 0.900 | 0.2600 |" in page


def test_a_method_that_cannot_start_is_a_result(tmp_path):
    def start(training, batch, constant):
        raise ImportError("a part is missing")

    task = replace(small_task(), entries=(Entry("broken", "Broken", start, 20),))
    store = Store(tmp_path)
    run_task(task, 1, tmp_path, store)
    (found,) = store.runs.values()
    assert found.status == "ImportError: a part is missing"


def test_the_search_chooses_the_rate_that_is_soonest_at_the_target():
    entry = sgd(10, (0.01, 0.1, 1.0))
    ends = {0.01: (1.5, 1e-3), 0.1: (0.5, 5e-3), 1.0: (0.1, 0.5)}

    def get(key: Key):
        seconds, value = ends[key.lr]
        return run(key, (seconds, 10.0, value))

    found = collect(TASK, entry, 3, get)
    assert found.lr == 0.1
    assert len(found.runs) == 3
    assert found.runs[0].key == key_of(TASK, entry, 0.1, 0, Budget(1, 8))
    assert found.search[0].key.limit == 2


def test_the_tasks_are_those_asked_for():
    assert len(TASKS) == 20
    order = [TASKS[name] for name in names_longest_first(TASKS.values())]
    longest = [task.limit * len(task.entries) for task in order]
    assert longest == sorted(longest, reverse=True)
    for task in TASKS.values():
        methods = [entry.method for entry in task.entries]
        assert len(set(methods)) == len(methods)
        assert methods[0] == "newton"
        assert {"sgd", "adam", "adamw", "muon"} <= set(methods)
        assert all(len(entry.rates) in (0, 5) for entry in task.entries)
        assert task.samples
    assert Poisson().training(0).size == TASKS["poisson"].samples
