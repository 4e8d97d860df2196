"""From settings to a run, and the run of `torchnewton train` in its folder."""

from __future__ import annotations

import platform
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, get_type_hints

import torch
from rich.console import Console
from rich.text import Text

from torchnewton.distributed import Diagonalized, Quorum
from torchnewton.optim import Newton
from torchnewton.train import data as tasks
from torchnewton.train import models
from torchnewton.train.checkpoint import Nowhere, RunFolder, check_free, free_name, new_folder
from torchnewton.train.display import Display, summary
from torchnewton.train.errors import UsageError
from torchnewton.train.figures import plot_run
from torchnewton.train.loop import Budget, Run, train
from torchnewton.train.methods import METHODS, default_batch_size, make_optimizer
from torchnewton.train.prepare import prepared
from torchnewton.train.ranks import is_launched, is_restarted, join

MOST = {"lr": 1e30, "threads": 1024, "ranks": 1024}
CAN_CHANGE = ("epochs", "seconds", "until_loss", "data", "data_dir", "device", "threads")  # in a resumed run


def check_seed(seed: int) -> None:
    """Refuses what PyTorch takes for no seed."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}: it has to be a whole number from 0 to 2⁶³ − 1.")


@dataclass(frozen=True)
class Settings:
    """What is run; `None` stands for the method's or the task's default.

    Raises:
        UsageError: if a number is out of range or both budgets are given.
    """

    data: str = "digits"
    data_dir: str = "data"
    model: str = "auto"
    method: str = "newton"
    lr: float | None = None
    batch_size: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    until_loss: float | None = None
    loss: str = "auto"
    C: float | None = None
    subset: float | None = None
    samples: int | None = None
    test_samples: int | None = None
    validation: float | None = None
    center: bool = False
    ranks: int = 1
    quorum: float | None = None

    def __post_init__(self) -> None:
        sizes = ("batch_size", "epochs", "threads", "samples", "test_samples", "ranks")
        for name in ("lr", "seconds", "until_loss", "C", *sizes):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST.get(name, sys.float_info.max):
                most = f", at most {MOST[name]:g}" if name in MOST else ""
                raise UsageError(f"--{name.replace('_', '-')} is {value}: it has to be a positive number{most}.")
        for name, high in (("subset", 1.0), ("validation", 0.9), ("quorum", 1.0)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= high:
                raise UsageError(f"--{name} is {value}: it has to be above 0 and at most {high:g}.")
        check_seed(self.seed)
        if self.epochs and self.seconds:
            raise UsageError("Give --epochs or --seconds, not both.")

    @property
    def budget(self) -> Budget:
        """The budget; epochs by method unless one is set."""
        if self.seconds:
            return Budget(seconds=self.seconds, loss=self.until_loss)
        return Budget(epochs=self.epochs or METHODS[self.method].epochs, loss=self.until_loss)


OF_THE_DATA = ("data", "data_dir", "device", "samples", "test_samples", "validation", "center", "loss")


def make_run(settings: Settings, data: tasks.Dataset | None = None) -> tuple[Settings, Run]:
    """Builds a run at its start, and the settings with defaults filled in; `data` saves preparing it again."""
    ranks = join(settings.device)
    device = _device(settings.device)
    torch.set_num_threads(settings.threads)
    if data is None:
        data = prepared(
            tasks.load(settings.data, Path(settings.data_dir)).to(device),
            settings.samples,
            settings.test_samples,
            settings.validation,
            settings.center,
            settings.loss,
        )
    torch.manual_seed(settings.seed)
    model = models.build(settings.model, data).to(device)
    weight_decay = 1 / (settings.C * len(data.x_train)) if settings.C else 0.0
    optimizer = make_optimizer(settings.method, model, settings.lr, weight_decay)
    ranks.give(optimizer, settings.method)
    if settings.quorum is not None:
        _give_quorum(optimizer, settings.method, settings.quorum)
    subset = settings.subset or METHODS[settings.method].subset
    if subset is not None and not isinstance(optimizer, Newton):
        raise UsageError(f"--subset is for Newton methods: {settings.method} takes no curvature.")
    convolutional = models.is_convolutional(settings.model, data)
    usual = default_batch_size(settings.method, data, convolutional=convolutional)
    batch_size = min(settings.batch_size or usual, len(data.x_train))
    generator = torch.Generator().manual_seed(settings.seed)
    full = replace(
        settings,
        model=models.resolve(settings.model, data),
        batch_size=batch_size,
        subset=subset,
        ranks=ranks.size,
    )
    return full, Run(data, model, optimizer, batch_size, generator, ranks=ranks, subset=subset)


def _give_quorum(optimizer: torch.optim.Optimizer, method: str, share: float) -> None:
    """End every rank's solve once that share of the ranks are done with theirs."""
    solver = optimizer.solver if isinstance(optimizer, Newton) else None
    if not (isinstance(optimizer, Newton) and isinstance(solver, Diagonalized)):
        raise UsageError(f"--quorum is for distributed-newton: the ranks of {method} do not solve on their own.")
    optimizer.solver = replace(solver, quorum=Quorum(share))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} is not available here: choose cpu, cuda, cuda:1 …") from error
    return device


def describe(run: Run) -> dict[str, str | int]:
    """What a reader needs to judge the numbers: sizes and versions."""
    return {
        "training samples": len(run.data.x_train),
        "test samples": len(run.data.x_test),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "torchnewton": _version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _version() -> str:
    try:
        return metadata.version("torchnewton")
    except metadata.PackageNotFoundError:
        return "not installed"


def train_new(settings: Settings, out: str | None, overwrite: bool, console: Console) -> int:
    """Runs `settings` in a new folder, made after all is checked; returns the exit code."""
    if out is not None and is_restarted() and (Path(out) / "checkpoint.pt").is_file():
        return train_resumed(out, {}, console)
    if not is_launched():
        check_free(Path(out or "runs"), overwrite or out is None)
    full, run = make_run(settings)
    if run.ranks.rank > 0:
        return _train_in(Nowhere(Path()), full, run, Console(quiet=True))
    stem = f"{run.data.name}-{full.model.replace(':', '-')}-{full.method}"
    folder = RunFolder(Path(out) if out is not None else free_name(stem))
    new_folder(folder.path, overwrite, (*folder.FILES, folder.BEST, *folder.SPECTRUM_FILES))
    folder.write_config({"settings": _to_store(full), "about": describe(run)})
    return _train_in(folder, full, run, console)


def _to_store(settings: Settings) -> dict[str, Any]:
    """The settings with full paths."""
    data_dir = str(Path(settings.data_dir).resolve())
    return asdict(replace(settings, data=tasks.absolute(settings.data), data_dir=data_dir))


def train_resumed(path: str, changes: Mapping[str, Any], console: Console) -> int:
    """Continues the run in folder `path` with `changes` of its settings; returns the exit code."""
    folder = RunFolder(Path(path))
    config, settings, run = resumed(folder, changes)
    if run.ranks.rank > 0:
        return _train_in(Nowhere(Path()), settings, run, Console(quiet=True))
    folder.write_metrics(run)
    folder.write_config({**config, "settings": _to_store(settings)})
    return _train_in(folder, settings, run, console)


def resumed(folder: RunFolder, changes: Mapping[str, Any]) -> tuple[dict[str, Any], Settings, Run]:
    """The stored configuration, the settings with `changes`, and the run where it ended; nothing is written."""
    config, stored = stored_settings(folder)
    if "data" in changes and not tasks.is_same_task(changes["data"], stored.data):
        raise UsageError(f"--data can only say where the file of {stored.data} is now.")
    budget = ("epochs", "seconds")
    if any(name in changes for name in budget):
        stored = replace(stored, epochs=None, seconds=None)
    settings, run = make_run(replace(stored, **changes))
    folder.load_state(run)
    if settings.budget.used(run) >= 1:
        raise UsageError(f"The run in {folder.path} has used its budget: give a larger --epochs or --seconds.")
    if settings.budget.has_reached(run):
        raise UsageError(f"The run in {folder.path} has reached its training loss: give a smaller --until-loss.")
    return config, settings, run


def stored_settings(folder: RunFolder) -> tuple[dict[str, Any], Settings]:
    """The content of a run folder's `config.json`, and the settings in it."""
    config = folder.read_config()
    kinds, stored = get_type_hints(Settings), config["settings"]
    for name, value in stored.items():
        if name not in kinds:
            raise UsageError(f"No run in {folder.path}: config.json has an unknown setting {name}.")
        if not isinstance(value, kinds[name]) and not (type(value) is int and isinstance(0.5, kinds[name])):
            raise UsageError(f"No run in {folder.path}: {value!r} in config.json is no value of {name}.")
    return config, Settings(**stored)


def _train_in(folder: RunFolder, settings: Settings, run: Run, console: Console) -> int:
    """Trains with a display, saving at every evaluation and at the end."""
    console.print(_headline(settings, run), soft_wrap=True)
    with _interruptible() as interrupted, Display(console, run, settings.budget) as display:

        def on_step(run: Run) -> bool:
            display.show_step(run)
            return bool(interrupted)

        def on_record(run: Run) -> None:
            display.show_record(run.history[-1])
            folder.append(run.history[-1])
            folder.save(run)
            if run.best is run.history[-1]:
                folder.save_best(run)

        run.progress = display.show_progress

        status = train(run, settings.budget, on_step, on_record)
        folder.save(run)
        folder.draw(lambda p: plot_run(run.history, run.data.metric, p))
    if status == "interrupted":
        console.print(f"Interrupted and saved; continue with: torchnewton train --resume {folder.path}", soft_wrap=True)
        return 130
    console.print(summary(run, status))
    if settings.until_loss is not None and status == "finished":
        missed = f"The training loss did not reach {settings.until_loss:g}: give more --epochs or --seconds."
        console.print(missed, soft_wrap=True)
    files = (*folder.FILES, folder.BEST) if run.best else folder.FILES
    console.print(f"Saved in {folder.path}: {', '.join(files)}", soft_wrap=True)
    return 1 if status == "diverged" else 0


def _headline(settings: Settings, run: Run) -> Text:
    lr = f", lr {settings.lr:g}" if settings.lr else ""
    if settings.subset:
        lr += f", curvature of {settings.subset:.3g} of them"
    parameters = sum(p.numel() for p in run.model.parameters())
    spread = f", {run.ranks.size} ranks" if run.ranks.size > 1 else ""
    return Text.assemble(
        (settings.method, "bold"),
        f" on {run.data.name}: {settings.model} with {parameters:,} parameters, "
        f"{len(run.data.x_train):,} training samples, batch {settings.batch_size}{lr}{spread}, seed {settings.seed}",
    )


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, so that a step is finished before the run stops; the second stops at once."""
    signals: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)
