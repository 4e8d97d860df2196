"""The curvature's spectrum at the end points of saved runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from torchnewton.analysis import Spectrum, spectrum
from torchnewton.analysis.spectral import FLAT
from torchnewton.curvature import Average, Estimate, GaussNewton, Hessian
from torchnewton.record import RecordError
from torchnewton.train import data as tasks
from torchnewton.train.checkpoint import RunFolder
from torchnewton.train.errors import UsageError, choose
from torchnewton.train.loop import Run, loss_function
from torchnewton.train.runs import OF_THE_DATA, Settings, check_seed, describe, make_run, stored_settings
from torchnewton.vectors import norm

BATCH = 1000  # samples whose graph is kept at once
CURVATURES = {"hessian": Hessian, "gauss-newton": GaussNewton}


@dataclass(frozen=True)
class Question:
    """What is asked of every run: options of `torchnewton spectrum`.

    Raises:
        UsageError: if a name is unknown or a number is out of range.
    """

    curvature: str = "hessian"
    samples: int = 5000
    probes: int = 5
    iterations: int = 150
    double: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        choose("curvature", self.curvature, list(CURVATURES))
        for name, least in (("samples", 1), ("probes", 2), ("iterations", 2)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}: it has to be at least {least}.")
        check_seed(self.seed)


@dataclass(frozen=True)
class EndPoint:
    """A saved run with the loss, the gradient norm and the spectrum at its parameters."""

    folder: Path
    settings: Settings
    about: dict[str, str | int]
    step: int
    samples: int
    loss: float
    gradient_norm: float
    spectrum: Spectrum
    cpu_seconds: float

    def setting(self, name: str) -> str:
        """One of the settings, in words."""
        value = str(getattr(self.settings, name))
        return tasks.short(value) if name == "data" else value

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return float(self.spectrum.largest.values[0])

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue."""
        return float(self.spectrum.smallest.values[0])

    @property
    def flat(self) -> Estimate[float]:
        """The share of eigenvalues that count as zero."""
        return self.spectrum.share(below=FLAT)

    @property
    def negative(self) -> Estimate[float]:
        """The share of eigenvalues below those."""
        return self.spectrum.share_between(-math.inf, -FLAT)


def look_at(
    folders: Sequence[Path],
    question: Question,
    on_progress: Callable[[str, float], None] = lambda label, fraction: None,
    device: str | None = None,
) -> list[EndPoint]:
    """The end points of the runs in `folders`, on `device` or on that of each run.

    `on_progress` is told the run and the fraction of all work.

    Raises:
        UsageError: if a folder holds no run, or its model has no finite loss or no curvature.
    """
    loaded: dict[tuple[object, ...], tasks.Dataset] = {}
    runs = []
    for folder in folders:
        _, settings = stored_settings(RunFolder(folder))
        settings = settings if device is None else replace(settings, device=device)
        key = tuple(getattr(settings, name) for name in OF_THE_DATA)
        settings, run = make_run(settings, loaded.get(key))
        loaded[key] = run.data
        RunFolder(folder).load_state(run)
        runs.append((folder, settings, run))
    points = []
    for i, (folder, settings, run) in enumerate(runs):

        def on_product(done: int, total: int, folder: Path = folder, i: int = i) -> None:
            on_progress(str(folder), (i + done / total) / len(folders))

        on_product(0, 1)
        try:
            points.append(_look(folder, settings, run, question, on_product))
        except RecordError as error:
            raise UsageError(f"The run in {folder} has no such curvature: {error}") from error
    return points


def _look(
    folder: Path, settings: Settings, run: Run, question: Question, on_product: Callable[[int, int], None]
) -> EndPoint:
    start = time.process_time()
    dtype = torch.float64 if question.double else None
    model = run.model.to(dtype).eval() if dtype else run.model.eval()
    index = torch.linspace(0, len(run.data.x_train) - 1, min(question.samples, len(run.data.x_train))).round().long()
    x, y = (t[index.to(t.device)] for t in (run.data.x_train, run.data.y_train))
    x, y = (t.to(dtype) if dtype and t.is_floating_point() else t for t in (x, y))
    A = Average(
        list(zip(x.split(BATCH), y.split(BATCH), strict=True)),
        [p for p in model.parameters() if p.requires_grad],
        lambda batch: loss_function(model(batch[0]), batch[1], run.data.loss),
        curvature=CURVATURES[question.curvature],
    )
    loss, gradient_norm = float(A.loss), norm(A.gradient)
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise UsageError(f"The run in {folder} has diverged (its loss is {loss:g}): there is no curvature to look at.")
    generator = torch.Generator().manual_seed(question.seed)
    found = spectrum(
        A,
        num_probes=question.probes,
        num_iterations=question.iterations,
        generator=generator,
        on_product=on_product,
    )
    seconds = time.process_time() - start
    return EndPoint(folder, settings, describe(run), run.step, len(x), loss, gradient_norm, found, seconds)


def groups(points: Sequence[EndPoint]) -> dict[str, list[EndPoint]]:
    """The seeds of each method, data or model; every run by itself where settings differ by more than that."""
    names = [n for n in ("method", "data", "model") if n == "method" or len({p.setting(n) for p in points}) > 1]
    found: dict[str, list[EndPoint]] = {}
    for point in points:
        found.setdefault(", ".join(point.setting(name) for name in names), []).append(point)
    if all(_differ_by_seed([p.settings for p in group]) for group in found.values()):
        return found
    return {str(point.folder).encode(errors="backslashreplace").decode(): [point] for point in points}


def _differ_by_seed(settings: Sequence[Settings]) -> bool:
    return len({replace(s, seed=0) for s in settings}) == 1 and len({s.seed for s in settings}) == len(settings)
