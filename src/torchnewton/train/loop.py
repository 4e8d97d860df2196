"""The training loop: the same for every method, because every method takes a closure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchnewton.optim import Newton, StepReport, Subsets
from torchnewton.record import Closure, Progress, over
from torchnewton.train.data import Dataset
from torchnewton.train.ranks import Ranks

TRAIN_SAMPLE = 2000  # training samples whose loss is recorded
MARKS = 25  # evaluations in a time budget


@dataclass(frozen=True)
class Record:
    """One evaluation. Losses are means in evaluation mode, the training loss over a fixed sample of 2,000.

    Seconds are those of training alone. `gradient_equivalents` counts the work since the start in gradients
    of a batch, `data_passes` in gradients of the training set: it compares methods of different batch sizes.
    The next three describe the last step of a Newton method; those of validation need a validation set.
    """

    step: int
    epoch: float
    cpu_seconds: float
    wall_seconds: float
    train_loss: float
    test_loss: float
    test_accuracy: float | None
    gradient_equivalents: float
    data_passes: float
    damping: float | None = None
    reduction_ratio: float | None = None
    inner_iterations: int | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    @property
    def validation_score(self) -> float | None:
        """Validation accuracy, or minus the loss where there is none: the greater, the better."""
        if self.validation_accuracy is None:
            return None if self.validation_loss is None else -self.validation_loss
        return self.validation_accuracy

    @property
    def metric(self) -> float:
        """Test accuracy, or the test loss where there is none; NaN once the model predicts no numbers."""
        if not self.is_finite():
            return math.nan
        return self.test_loss if self.test_accuracy is None else self.test_accuracy

    def is_finite(self) -> bool:
        """Whether the model still predicts numbers."""
        return math.isfinite(self.train_loss) and math.isfinite(self.test_loss)


@dataclass
class Run:
    """What a run is made of and where it stands: everything a checkpoint has to hold.

    With `subset` every step takes the loss of all data, in batches of `batch_size`, and the curvature of that part of
    them: see `torchnewton.Subsets`. `progress` is that of `torchnewton.over`.
    """

    data: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_size: int
    generator: torch.Generator
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    step: int = 0
    batches: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    gradient_equivalents: float = 0.0
    loss: float = math.nan  # of the last step's batch, before the step
    history: list[Record] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)
    subset: float | None = None
    progress: Progress | None = None

    @property
    def samples_per_step(self) -> int:
        """Those of a batch, or all."""
        return self.batch_size if self.subset is None else len(self.data.x_train)

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in the training set: the remainder waits for the next shuffle."""
        return max(1, len(self.data.x_train) // self.samples_per_step)

    @property
    def best(self) -> Record | None:
        """The first record with the greatest validation score."""
        scored = [(r.validation_score, r) for r in self.history if r.validation_score is not None]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None

    @property
    def epoch(self) -> float:
        """How often the training data have been seen."""
        return self.batches / self.batches_per_epoch

    @property
    def draws_batches(self) -> bool:
        """Whether each call of the closure within a step has to draw a new batch; else a step has one."""
        return hasattr(self.optimizer, "calls_per_step")

    def state_dict(self) -> dict[str, Any]:
        """All that changes during a run, for `torch.save`."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": {"order": self.generator.get_state(), "torch": torch.get_rng_state()},
            "place": {name: getattr(self, name) for name in _PLACE},
            "history": [asdict(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["random"]["order"])
        torch.set_rng_state(state["random"]["torch"])
        for name in _PLACE:
            setattr(self, name, state["place"][name])
        self.history = [Record(**record) for record in state["history"]]


_PLACE = ("order", "step", "batches", "cpu_seconds", "wall_seconds", "gradient_equivalents")


@dataclass(frozen=True)
class Budget:
    """When a run ends: after `epochs`, or after CPU `seconds` (wall-clock seconds on an accelerator).

    With `loss` it ends sooner: once the mean loss over all training data, looked at ten times an epoch, is as low. The
    last step is then cut short where it reaches that loss, or, if it was below before, the way since the last look: so
    methods with long steps end at the same loss.
    """

    epochs: int | None = None
    seconds: float | None = None
    loss: float | None = None

    def used(self, run: Run) -> float:
        """The used fraction of the budget."""
        if self.epochs is not None:
            return run.epoch / self.epochs
        seconds = run.cpu_seconds if run.data.x_train.device.type == "cpu" else run.wall_seconds
        return seconds / self.seconds if self.seconds else 1.0

    def looks(self, run: Run, before: int) -> bool:
        """Whether to look at the training loss: where a tenth of an epoch is full that was not at `before` batches."""
        interval = max(1, run.batches_per_epoch // 10)
        return self.loss is not None and run.batches // interval != before // interval

    def has_reached(self, run: Run) -> bool:
        """Whether the training loss is as low as `loss`; the look is no part of the run's time."""
        if self.loss is None:
            return False
        (reached,) = run.ranks.first(training_loss(run) <= self.loss)
        return bool(reached)

    def is_evaluation_due(self, run: Run, before: float) -> bool:
        """Every epoch, or at marks of the seconds, dense at the start; `before` is `used` a step ago."""
        if self.epochs is not None:
            return int(run.epoch) > int(before * self.epochs + 1e-9)
        used = self.used(run)
        return used >= 1 or math.isqrt(int(used * MARKS**2)) > math.isqrt(int(before * MARKS**2))


def train(
    run: Run,
    budget: Budget,
    on_step: Callable[[Run], bool] = lambda run: False,
    on_record: Callable[[Run], None] = lambda run: None,
) -> str:
    """Trains until the budget is spent or `on_step` returns true.

    Returns `finished`, `interrupted`, `training loss reached`, or `diverged` where the model predicts no numbers.
    """
    if not run.history:
        run.history.append(evaluate(run))
        on_record(run)
    used = budget.used(run)
    above = _copied(run.model) if budget.loss else []  # where the last look has found the loss too high
    while used < 1:
        before = _copied(run.model) if budget.loss else []
        batches = run.batches
        train_step(run)
        looks = budget.looks(run, batches)
        reached = looks and budget.has_reached(run)
        if reached and budget.loss:
            cut_back(run, [before, above], budget.loss)
        elif looks:
            above = _copied(run.model)
        if reached or budget.is_evaluation_due(run, before=used):
            run.history.append(evaluate(run))
            on_record(run)
            if not run.history[-1].is_finite():
                return "diverged"
        if reached:
            return "training loss reached"
        used = budget.used(run)
        if run.ranks.any(on_step(run)):
            return "interrupted"
    return "finished"


def train_step(run: Run) -> None:
    """One step on the next batch, with its time and its work."""
    cpu, wall = time.process_time(), time.perf_counter()
    loss, calls = _batch_step(run) if run.subset is None else (_full_step(run, run.subset), 0)
    run.loss = float(torch.as_tensor(loss).detach())  # waits for accelerators
    report = step_report(run)
    run.gradient_equivalents += report.gradient_equivalents if report else calls
    cpu, wall = run.ranks.first(time.process_time() - cpu, time.perf_counter() - wall)
    run.cpu_seconds += cpu
    run.wall_seconds += wall
    run.step += 1


def _batch_step(run: Run) -> tuple[Any, int]:
    """A step on the next batch; gives its loss and the calls of the closure."""
    calls = 0
    batch = None if run.draws_batches else next_batch(run)

    def closure() -> Any:
        nonlocal calls
        calls += 1
        x, y = batch or next_batch(run)
        run.optimizer.zero_grad()
        loss = loss_function(run.model(x), y, run.data.loss)
        loss.backward()
        return loss

    return run.optimizer.step(closure), calls


def _full_step(run: Run, fraction: float) -> Any:
    """A Newton step on all data with the curvature of the next block of them, the ranks' parts of both; the loss."""
    data, seed = run.data, run.generator.initial_seed()
    run.batches += 1

    def objective(indices: Tensor) -> Closure:
        count = -(-len(indices) // (run.batch_size * run.ranks.size))  # the same on all ranks
        batches = run.ranks.part(indices).to(data.x_train.device).tensor_split(count)
        return over(
            batches,
            lambda i: loss_function(run.model(data.x_train[i]), data.y_train[i], data.loss),
            progress=run.progress,
        )

    assert isinstance(run.optimizer, Newton)
    block = Subsets(len(data.x_train), fraction, seed).block(run.step)
    everything = objective(torch.arange(len(data.x_train)))
    return run.optimizer.step(everything, curvature=objective(block) if len(block) < len(data.x_train) else None)


def _copied(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@torch.no_grad()
def cut_back(run: Run, earlier: Sequence[Sequence[Tensor]], loss: float) -> None:
    """Moves the parameters back to where the training loss is `loss`, by 20 bisections.

    The way is that to the first of the `earlier` points, the latest of them first, or from there to the next, if the
    loss is as low already there; nothing moves if it is so at all. Buffers and the optimizer's state stay.
    """
    params = list(run.model.parameters())
    after: Sequence[Tensor] = (end := _copied(run.model))

    def move(before: Sequence[Tensor], fraction: float) -> float:
        for p, a, b in zip(params, before, after, strict=True):
            p.copy_(a.lerp(b, fraction))
        return training_loss(run)

    for before in earlier:
        if move(before, 0.0) > loss:
            high, low = 0.0, 1.0  # fractions of the way above and below the loss
            for _ in range(20):
                middle = (high + low) / 2
                high, low = (middle, low) if move(before, middle) > loss else (high, middle)
            move(before, low)
            return
        after = before
    move(end, 0.0)


def next_batch(run: Run) -> tuple[Tensor, Tensor]:
    """The next batch of a shuffle that is drawn anew for each epoch, or this rank's part of it."""
    position = run.batches % run.batches_per_epoch
    run.batches += 1
    if position == 0:
        run.order = torch.randperm(len(run.data.x_train), generator=run.generator)
    index = run.ranks.part(run.order[position * run.batch_size : (position + 1) * run.batch_size])
    index = index.to(run.data.x_train.device)
    return run.data.x_train[index], run.data.y_train[index]


def step_report(run: Run) -> StepReport | None:
    """The last step's numbers, where the optimizer is a Newton method."""
    report = getattr(run.optimizer, "report", None)
    return report if isinstance(report, StepReport) and math.isfinite(report.damping) else None


def loss_function(output: Tensor, y: Tensor, kind: str = "auto") -> Tensor:
    """Mean squared error for values, mean cross entropy for class numbers.

    For class numbers "squared-error" is Σ‖z − y‖²/N with y one-hot: summed over the classes, the mean over N samples.
    """
    if y.is_floating_point():
        return F.mse_loss(output, y)
    output, y = output.flatten(0, -2), y.flatten()
    if kind == "squared-error":
        return F.mse_loss(output, F.one_hot(y, output.shape[-1]).to(output.dtype), reduction="sum") / len(y)
    return F.cross_entropy(output, y)


def training_loss(run: Run) -> float:
    """The mean loss over all training data, in evaluation mode."""
    return _measure(run.model, run.data.x_train, run.data.y_train, run.data.loss)[0]


def evaluate(run: Run) -> Record:
    """Measures the model as it is; leaves parameters, buffers and random state alone."""
    data, report = run.data, step_report(run)
    stride = max(1, len(data.x_train) // TRAIN_SAMPLE)
    train_loss, _ = _measure(run.model, data.x_train[::stride], data.y_train[::stride], data.loss)
    test_loss, accuracy = _measure(run.model, data.x_test, data.y_test, data.loss)
    held_loss, held_accuracy = None, None
    if data.x_validation is not None and data.y_validation is not None:
        held_loss, held_accuracy = _measure(run.model, data.x_validation, data.y_validation, data.loss)
    return Record(
        run.step,
        run.epoch,
        run.cpu_seconds,
        run.wall_seconds,
        train_loss,
        test_loss,
        accuracy,
        run.gradient_equivalents,
        run.gradient_equivalents * run.samples_per_step / len(data.x_train),
        report.damping if report else None,
        report.reduction_ratio if report else None,
        report.inner_iterations if report else None,
        held_loss,
        held_accuracy,
    )


@torch.no_grad()
def _measure(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> tuple[float, float | None]:
    """Mean loss and accuracy (`None` for regression) over all samples."""
    model.eval()
    total, correct = 0.0, 0
    for xs, ys in zip(x.split(1000), y.split(1000), strict=True):
        output = model(xs)
        total += len(xs) * float(loss_function(output, ys, kind))
        correct += int((output.argmax(-1) == ys).sum()) if output.ndim == ys.ndim + 1 else 0
    model.train()
    return total / len(x), None if y.is_floating_point() else correct / y.numel()
