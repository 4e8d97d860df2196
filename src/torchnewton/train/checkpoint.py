"""The run folder: `config.json`, `metrics.jsonl`, `checkpoint.pt` and `curves.png`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchnewton.train.errors import UsageError
from torchnewton.train.loop import Record, Run


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file and renames it to `path`, so that `path` is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with `null` for numbers that are not finite, which JSON does not know.

    >>> to_json({"loss": float("nan")})
    '{"loss": null}'
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(value), indent=indent, ensure_ascii=False)


def new_folder(folder: Path, overwrite: bool, files: tuple[str, ...]) -> None:
    """Makes `folder`; in one with content only `files` are removed, and only with `overwrite`."""
    check_free(folder, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be written: {error.strerror}.") from error


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a file, and a folder with content unless `overwrite`."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose a folder for --out.")
    if folder.exists() and not overwrite and any(folder.iterdir()):
        raise UsageError(f"The folder {folder} is not empty: choose another --out or add --overwrite.")


def free_name(stem: str) -> Path:
    """The first of `runs/stem-1`, `runs/stem-2` … that does not exist."""
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return folder


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes one run's files."""

    path: Path
    BEST = "best.pt"  # the model that was best on the validation set
    FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "curves.png")
    SPECTRUM_FILES = ("spectrum.json", "spectrum.png", "spectrum.svg")  # of `torchnewton spectrum`

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes what was run."""
        write_atomically(self.path / "config.json", lambda p: p.write_text(to_json(config, indent=2) + "\n"))

    def read_config(self) -> dict[str, Any]:
        """Reads what was run."""
        try:
            config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
            return {**config, "settings": dict(config["settings"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"No run in {self.path}: config.json is missing or broken.") from error

    def append(self, record: Record) -> None:
        """Adds one line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(to_json(asdict(record)) + "\n")

    def save(self, run: Run) -> None:
        """Writes the checkpoint."""
        write_atomically(self.path / "checkpoint.pt", lambda p: torch.save(run.state_dict(), p))

    def save_best(self, run: Run) -> None:
        """Writes the model as it is, for `model.load_state_dict`."""
        write_atomically(self.path / self.BEST, lambda p: torch.save(run.model.state_dict(), p))

    def draw(self, plot: Callable[[Path], object]) -> None:
        """Writes the curves."""
        write_atomically(self.path / "curves.png", plot)

    def load(self, run: Run) -> None:
        """Puts `run` where the checkpoint was taken and drops metrics written after it."""
        self.load_state(run)
        self.write_metrics(run)

    def write_metrics(self, run: Run) -> None:
        """Writes the evaluations so far, and nothing after them."""
        lines = "".join(to_json(asdict(record)) + "\n" for record in run.history)
        write_atomically(self.path / "metrics.jsonl", lambda p: p.write_text(lines))

    def load_state(self, run: Run) -> None:
        """Puts `run` where the checkpoint was taken; changes no file."""
        path = self.path / "checkpoint.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            run.load_state_dict(state)
        except FileNotFoundError as error:
            raise UsageError(f"No run in {self.path}: checkpoint.pt is missing.") from error
        except Exception as error:
            raise UsageError(f"{path} is broken or belongs to another model: start the run again.") from error


class Nowhere(RunFolder):
    """What the ranks write that are not the first: nothing."""

    def append(self, record: Record) -> None:
        """Nothing."""

    def save(self, run: Run) -> None:
        """Nothing."""

    def save_best(self, run: Run) -> None:
        """Nothing."""

    def draw(self, plot: Callable[[Path], object]) -> None:
        """Nothing."""
