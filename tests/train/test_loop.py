"""The loop, the run folder and exact continuation."""

import json
import math

import pytest
import torch
from tasks import images, values

from torchnewton.train.checkpoint import RunFolder, free_name, new_folder, to_json, write_atomically
from torchnewton.train.errors import UsageError
from torchnewton.train.loop import Budget, Run, loss_function, train, train_step
from torchnewton.train.methods import NAMES, make_optimizer
from torchnewton.train.models import build
from torchnewton.train.prepare import prepared


def make(method="sgd", data=None, batch_size=8, lr=None):
    torch.manual_seed(1)
    data = data or images()
    model = build("auto", data)
    return Run(data, model, make_optimizer(method, model, lr), batch_size, torch.Generator().manual_seed(2))


def curve(run):
    """What has to be equal: everything but the times."""
    return [(r.step, r.train_loss, r.test_loss, r.test_accuracy, r.gradient_equivalents) for r in run.history]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("stop_at", [10, 13])
def test_a_saved_run_continues_bit_for_bit(tmp_path, method, stop_at):
    whole = make(method)
    budget = Budget(epochs=4 * getattr(whole.optimizer, "calls_per_step", 1))
    assert train(whole, budget) == "finished"
    assert whole.step == 20

    first = make(method)
    status = train(first, budget, on_step=lambda run: run.step == stop_at)
    assert (status, first.step) == ("interrupted", stop_at)
    RunFolder(tmp_path).save(first)
    torch.randn(3)  # another process has another random state

    second = make(method)
    RunFolder(tmp_path).load(second)
    assert train(second, budget) == "finished"
    assert curve(second) == curve(whole)
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["newton-cg", "newton", "sgn", "newton-krylov"])
def test_a_step_on_all_data_continues_bit_for_bit(tmp_path, method):
    """The subsets go on where they were, into the second pass over them."""

    data = prepared(images(), loss="squared-error", validation=0.2)

    def run():
        made = make(method, data)
        made.subset = 0.4
        return made

    whole = run()
    assert (whole.batches_per_epoch, whole.samples_per_step) == (1, 32)
    train(whole, Budget(epochs=5))
    assert whole.history[-1].train_loss < whole.history[0].train_loss
    first = run()
    train(first, Budget(epochs=2))
    RunFolder(tmp_path).save(first)
    second = run()
    RunFolder(tmp_path).load(second)
    train(second, Budget(epochs=5))
    assert curve(second) == curve(whole)
    assert [r.validation_accuracy for r in second.history] == [r.validation_accuracy for r in whole.history]
    scores = [r.validation_score for r in whole.history]
    assert whole.best is whole.history[scores.index(max(scores))]


def test_squared_error_is_summed_over_the_classes():
    z, y = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    expected = sum(((z[i] - torch.eye(3)[y[i]]) ** 2).sum() for i in range(5)) / 5
    assert torch.allclose(loss_function(z, y, "squared-error"), expected)


def test_a_run_is_recorded_at_the_start_and_after_each_epoch():
    run = make(data=values())
    train(run, Budget(epochs=3))
    assert [r.step for r in run.history] == [0, 5, 10, 15]
    assert [r.epoch for r in run.history] == [0, 1, 2, 3]
    assert all(r.test_accuracy is None and r.metric == r.test_loss for r in run.history)
    assert run.history[-1].train_loss < run.history[0].train_loss


def test_methods_that_draw_batches_count_epochs_in_batches():
    """Five batches an epoch, twenty a step: four epochs a step, and all batches differ within an epoch."""
    run, seen = make("entropy-sgd"), []
    run.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].sum().item()))
    train_step(run)
    assert (run.step, run.batches, run.epoch) == (1, 20, 4)
    assert all(len(set(seen[i : i + 5])) == 5 for i in range(0, 20, 5))
    run = make("entropy-sgd")
    assert train(run, Budget(epochs=9)) == "finished"
    assert [r.epoch for r in run.history] == [0, 4, 8, 12]


def test_every_epoch_sees_each_sample_once_in_a_new_order():
    run = make(batch_size=8)
    orders = []
    train(run, Budget(epochs=2), on_step=lambda run: orders.append(run.order.tolist()))
    assert sorted(orders[0]) == list(range(40))
    assert orders[0] == orders[4] != orders[5]


@pytest.mark.parametrize(("method", "least", "most"), [("sgd", 5, 5), ("lbfgs", 6, 200), ("newton", 6, 10_000)])
def test_work_is_counted_in_gradients(method, least, most):
    run = make(method)
    train(run, Budget(epochs=1))
    last = run.history[-1]
    assert least <= last.gradient_equivalents <= most
    assert last.data_passes == pytest.approx(last.gradient_equivalents * 8 / 40)
    assert (last.damping is not None) == (method == "newton")


def test_seconds_end_a_run_and_evaluation_is_dense_at_the_start():
    run = make()
    assert train(run, Budget(seconds=0.2)) == "finished"
    times = [r.cpu_seconds for r in run.history]
    assert 0.2 <= times[-1] < 0.4
    assert len(times) <= 27
    assert sum(t < 0.05 for t in times) >= sum(t > 0.15 for t in times)


def test_a_diverging_run_ends():
    run = make(lr=1e30)
    assert train(run, Budget(epochs=50)) == "diverged"
    assert run.step < 50


def test_evaluation_leaves_the_random_state_alone():
    run = make()
    before = torch.get_rng_state()
    train(run, Budget(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    folder, run = RunFolder(tmp_path), make()
    train(run, Budget(epochs=2), on_record=lambda run: folder.append(run.history[-1]))
    folder.save(run)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11}\n{"half a li')
    folder.load(make())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5, 10]


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_a_missing_or_broken_checkpoint_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(UsageError, match=r"checkpoint\.pt is (missing|broken)"):
        RunFolder(tmp_path).load(make())


def test_a_checkpoint_of_another_model_is_one_sentence(tmp_path):
    RunFolder(tmp_path).save(make())
    with pytest.raises(UsageError, match="belongs to another model"):
        RunFolder(tmp_path).load(make(data=values()))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda p: p.write_text("old"))

    def fail(temporary):
        temporary.write_text("ne")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"


def test_overwriting_removes_the_runs_own_files_alone(tmp_path):
    for name in ("mine", "config.json"):
        (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match="not empty"):
        new_folder(tmp_path, overwrite=False, files=RunFolder.FILES)
    new_folder(tmp_path, overwrite=True, files=RunFolder.FILES)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_free_names_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    free_name("a").mkdir(parents=True)
    assert free_name("a").name == "a-2"


def test_json_has_null_for_what_is_not_finite():
    assert to_json({"a": [math.nan, (math.inf, 1.5)], "b": "λ"}) == '{"a": [null, [null, 1.5]], "b": "\\u03bb"}'
