"""The run folder: `config.json`, `metrics.jsonl`, `checkpoint.pt` and `curves.png`."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from torchnewton.train.errors import UsageError
from torchnewton.train.loop import Record, Run


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file and renames it to `path`, so that `path` is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _writing(path):
            write(temporary)
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the system says of a full disk or a forbidden folder into one sentence."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_text(path: Path, text: str) -> None:
    """The text as UTF-8, whole or not at all; what is no text in a path, as its escape."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))


def _save(state: dict[str, Any], path: Path) -> None:
    content = io.BytesIO()  # PyTorch's own writer does not say when the disk is full
    torch.save(state, content)
    path.write_bytes(content.getbuffer())


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

    return json.dumps(clean(value), indent=indent)


def new_folder(folder: Path, overwrite: bool, files: tuple[str, ...]) -> None:
    """Makes `folder`; in one with content only `files` are removed, and only with `overwrite`."""
    check_free(folder, overwrite)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / name).unlink(missing_ok=True)


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a file, a folder that cannot be made or written, and one with content unless `overwrite`."""
    with _writing(folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UsageError(f"{there} is a file: choose a folder for --out.")
        if there == folder and not overwrite and any(folder.iterdir()):
            raise UsageError(f"The folder {folder} is not empty: choose another --out or add --overwrite.")
        with TemporaryFile(dir=there):
            pass


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
        write_text(self.path / "config.json", to_json(config, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Reads what was run."""
        try:
            config: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            return {**config, "settings": dict(config["settings"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"No run in {self.path}: config.json is missing or broken.") from error

    def append(self, record: Record) -> None:
        """Adds one line to `metrics.jsonl`."""
        path = self.path / "metrics.jsonl"
        with _writing(path), path.open("a", encoding="utf-8") as file:
            file.write(to_json(asdict(record)) + "\n")

    def save(self, run: Run) -> None:
        """Writes the checkpoint."""
        write_atomically(self.path / "checkpoint.pt", lambda p: _save(run.state_dict(), p))

    def save_best(self, run: Run) -> None:
        """Writes the model as it is, for `model.load_state_dict`."""
        write_atomically(self.path / self.BEST, lambda p: _save(run.model.state_dict(), p))

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
        write_text(self.path / "metrics.jsonl", lines)

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
