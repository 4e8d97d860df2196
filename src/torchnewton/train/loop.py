"""The training loop: the same for every method, because every method takes a closure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchnewton.optim.report import StepReport
from torchnewton.train.data import Dataset
from torchnewton.train.ranks import Ranks

TRAIN_SAMPLE = 2000  # training samples whose loss is recorded
MARKS = 25  # evaluations in a time budget


@dataclass(frozen=True)
class Record:
    """One evaluation. Losses are means in evaluation mode, the training loss over a fixed sample of 2,000.

    Seconds are those of training alone. `gradient_equivalents` counts the work since the start in gradients
    of a batch, `data_passes` in gradients of the training set: it compares methods of different batch sizes.
    The last three describe the last step of a Newton method.
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

    @property
    def metric(self) -> float:
        """Test accuracy, or the test loss where there is none."""
        return self.test_loss if self.test_accuracy is None else self.test_accuracy

    def is_finite(self) -> bool:
        """Whether the model still predicts numbers."""
        return math.isfinite(self.train_loss) and math.isfinite(self.test_loss)


@dataclass
class Run:
    """What a run is made of and where it stands: everything a checkpoint has to hold."""

    data: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_size: int
    generator: torch.Generator
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    step: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    gradient_equivalents: float = 0.0
    loss: float = math.nan  # of the last step's batch, before the step
    history: list[Record] = field(default_factory=list)
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training set: the remainder waits for the next shuffle."""
        return max(1, len(self.data.x_train) // self.batch_size)

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


_PLACE = ("order", "step", "cpu_seconds", "wall_seconds", "gradient_equivalents")


@dataclass(frozen=True)
class Budget:
    """When a run ends: after `epochs`, or after CPU `seconds` (wall-clock seconds on an accelerator).

    With `loss` it ends sooner: once the mean loss over all training data, looked at ten times an epoch, is as low. The
    last step is then cut short where it reaches that loss, so that methods with long steps end at the same loss.
    """

    epochs: int | None = None
    seconds: float | None = None
    loss: float | None = None

    def used(self, run: Run) -> float:
        """The used fraction of the budget."""
        if self.epochs is not None:
            return run.step / (self.epochs * run.steps_per_epoch)
        seconds = run.cpu_seconds if run.data.x_train.device.type == "cpu" else run.wall_seconds
        return seconds / self.seconds if self.seconds else 1.0

    def has_reached(self, run: Run) -> bool:
        """Whether the training loss is as low as `loss`; the look is no part of the run's time."""
        if self.loss is None or run.step % max(1, run.steps_per_epoch // 10):
            return False
        (reached,) = run.ranks.first(training_loss(run) <= self.loss)
        return bool(reached)

    def is_evaluation_due(self, run: Run, before: float) -> bool:
        """Every epoch, or at marks of the seconds, dense at the start; `before` is `used` a step ago."""
        if self.epochs is not None:
            return run.step % run.steps_per_epoch == 0
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
    while used < 1:
        before = [p.detach().clone() for p in run.model.parameters()] if budget.loss else []
        train_step(run)
        reached = budget.has_reached(run)
        if reached and budget.loss:
            cut_last_step(run, before, budget.loss)
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
    cpu, wall, calls = time.process_time(), time.perf_counter(), 0
    x, y = next_batch(run)

    def closure() -> Any:
        nonlocal calls
        calls += 1
        run.optimizer.zero_grad()
        loss = loss_function(run.model(x), y)
        loss.backward()
        return loss

    run.loss = float(torch.as_tensor(run.optimizer.step(closure)).detach())  # waits for accelerators
    report = step_report(run)
    run.gradient_equivalents += report.gradient_equivalents if report else calls
    cpu, wall = run.ranks.first(time.process_time() - cpu, time.perf_counter() - wall)
    run.cpu_seconds += cpu
    run.wall_seconds += wall
    run.step += 1


@torch.no_grad()
def cut_last_step(run: Run, before: list[Tensor], loss: float) -> None:
    """Moves the parameters back towards `before` to where the training loss is `loss`, by 20 bisections.

    They stay where `before` is as low already. Buffers and the optimizer's state are those after the whole step.
    """
    params = list(run.model.parameters())
    after = [p.clone() for p in params]
    high, low = 0.0, 1.0  # fractions of the step above and below the loss

    def move(fraction: float) -> float:
        for p, a, b in zip(params, before, after, strict=True):
            p.copy_(a.lerp(b, fraction))
        return training_loss(run)

    if move(high) > loss:
        for _ in range(20):
            middle = (high + low) / 2
            high, low = (middle, low) if move(middle) > loss else (high, middle)
    move(low)


def next_batch(run: Run) -> tuple[Tensor, Tensor]:
    """The next batch of a shuffle that is drawn anew for each epoch, or this rank's part of it."""
    position = run.step % run.steps_per_epoch
    if position == 0:
        run.order = torch.randperm(len(run.data.x_train), generator=run.generator)
    index = run.ranks.part(run.order[position * run.batch_size : (position + 1) * run.batch_size])
    index = index.to(run.data.x_train.device)
    return run.data.x_train[index], run.data.y_train[index]


def step_report(run: Run) -> StepReport | None:
    """The last step's numbers, where the optimizer keeps them."""
    report = getattr(run.optimizer, "report", None)
    return report if isinstance(report, StepReport) else None


def loss_function(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error for values, mean cross entropy for class numbers."""
    if y.is_floating_point():
        return F.mse_loss(output, y)
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def training_loss(run: Run) -> float:
    """The mean loss over all training data, in evaluation mode."""
    return _measure(run.model, run.data.x_train, run.data.y_train)[0]


def evaluate(run: Run) -> Record:
    """Measures the model as it is; leaves parameters, buffers and random state alone."""
    data, report = run.data, step_report(run)
    stride = max(1, len(data.x_train) // TRAIN_SAMPLE)
    train_loss, _ = _measure(run.model, data.x_train[::stride], data.y_train[::stride])
    test_loss, accuracy = _measure(run.model, data.x_test, data.y_test)
    return Record(
        run.step,
        run.step / run.steps_per_epoch,
        run.cpu_seconds,
        run.wall_seconds,
        train_loss,
        test_loss,
        accuracy,
        run.gradient_equivalents,
        run.gradient_equivalents * run.batch_size / len(data.x_train),
        *((report.damping, report.reduction_ratio, report.inner_iterations) if report else ()),
    )


@torch.no_grad()
def _measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """Mean loss and accuracy (`None` for regression) over all samples."""
    model.eval()
    total, correct = 0.0, 0
    for xs, ys in zip(x.split(1000), y.split(1000), strict=True):
        output = model(xs)
        total += len(xs) * float(loss_function(output, ys))
        correct += int((output.argmax(-1) == ys).sum()) if output.ndim == ys.ndim + 1 else 0
    model.train()
    return total / len(x), None if y.is_floating_point() else correct / y.numel()
