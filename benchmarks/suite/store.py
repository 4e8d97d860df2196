"""Finished runs on disk, one JSON line each, with the machine and the versions they were measured with."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
import statistics
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import torchnewton
from benchmarks.suite.measure import Point
from benchmarks.suite.task import Task


@dataclass(frozen=True)
class Key:
    """What a run is; a run whose key is in the store is not measured again."""

    task: str
    method: str
    lr: float | None
    batch: int | None
    seed: int
    seconds: float
    limit: float


@dataclass(frozen=True)
class Run:
    key: Key
    status: str
    points: list[Point]
    about: dict[str, str]

    @property
    def seconds(self) -> float:
        """CPU seconds of training."""
        return self.points[-1].seconds

    def first(self, task: Task, target: float) -> Point | None:
        """The first evaluation that reaches `target`."""
        return next((p for p in self.points if task.reaches(p.value, target)), None)

    def best(self, task: Task) -> float:
        """The best test value on the way."""
        values = [p.value for p in self.points if p.value is not None]
        return max(values) if task.is_accuracy else min(values)

    @property
    def settled(self) -> float:
        """The median test value in the last third of the time: what a curve is at, not what it touches."""
        known = [(p.seconds, p.value) for p in self.points if p.value is not None]
        late = [value for seconds, value in known if 3 * seconds >= 2 * self.seconds]
        return statistics.median(late or [known[-1][1]])


class Store:
    """The runs in a folder: one file for each task, so that two processes may run two tasks side by side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[Key, Run] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                raw = json.loads(line)
                key = Key(**raw["key"])
                self.runs[key] = Run(key, raw["status"], [Point(*p) for p in raw["points"]], raw["about"])

    def get(self, key: Key) -> Run | None:
        return self.runs.get(key)

    def add(self, run: Run) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.runs[run.key] = run
        points = [[_short(x) for x in point] for point in run.points]
        line = {"key": asdict(run.key), "status": run.status, "about": run.about, "points": points}
        with self._path(run.key.task).open("ab", buffering=0) as file:  # whole lines, whoever reads meanwhile
            file.write(f"{json.dumps(line)}\n".encode())

    def forget(self, task: str) -> None:
        """Drops the runs of a task."""
        self._path(task).unlink(missing_ok=True)
        self.runs = {key: run for key, run in self.runs.items() if key.task != task}

    def _path(self, task: str) -> Path:
        return self.folder / f"{task}.jsonl"


def _short(x: float | None) -> Any:
    return float(f"{x:.6g}") if isinstance(x, float) else x


def about() -> dict[str, str]:
    """Machine, versions and date, for each run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchnewton": f"{metadata.version('torchnewton')} (source {_source()})",
    }


def _source() -> str:
    """A short hash of the package's source: runs of different sources are not one comparison."""
    root = Path(torchnewton.__file__).parent
    content = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(content).hexdigest()[:8]


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
