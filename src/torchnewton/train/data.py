"""Tasks by name: every reader returns one `Dataset` of tensors in memory."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchnewton.train import cifar
from torchnewton.train.errors import UsageError

SPLIT_SEED = 0  # splits and noise belong to the task, not to the run's seed
WINDOW = 64  # characters a text model sees
MAX_ENTRIES = 2**30  # of a table: 8 GB while it is read

Array = NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """A task: training and test tensors, and what is to be predicted.

    Inputs are images `(N, C, H, W)`, features `(N, features)` or character numbers `(N, window)`; targets are
    class numbers `(N,)`, values `(N, 1)` or next characters `(N, window)`. `num_classes` is 0 for regression. `loss` is
    one of `torchnewton.train.loop.LOSSES`.
    """

    name: str
    kind: Literal["classification", "regression", "text"]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int = 0
    x_validation: Tensor | None = None
    y_validation: Tensor | None = None
    loss: str = "auto"

    @property
    def is_image(self) -> bool:
        """Whether the inputs are images."""
        return self.x_train.ndim == 4

    @property
    def metric(self) -> str:
        """The name of the test metric: `accuracy`, or `mse` for regression."""
        return "mse" if self.kind == "regression" else "accuracy"

    def to(self, device: torch.device) -> Dataset:
        """The same task with its tensors on `device`."""
        names = [f.name for f in fields(self) if f.name[:2] in ("x_", "y_")]
        there: dict[str, Any] = {n: getattr(self, n).to(device) for n in names if getattr(self, n) is not None}
        return replace(self, **there)


def load(spec: str, data_dir: Path) -> Dataset:
    """Reads the task `spec`: a name of `NAMES`, where `sine` takes `:FREQUENCY` and some take `:FILE`.

    Raises:
        UsageError: if the name is unknown or a file is missing or broken.
    """
    name, _, argument = spec.partition(":")
    if spec == "cifar10-npz":  # its name when it read nothing else
        name = "cifar10"
    if name == "sine" and (not argument or (_is_number(argument) and 0 < float(argument) < math.inf)):
        return _sine(float(argument or 10))
    if name in _FROM_FILE and argument:
        path = Path(argument)
        if not path.is_file():
            raise UsageError(f"There is no file {path} to read for --data {name}:FILE.")
        return _FROM_FILE[name](path)
    if name in _STANDARD and not argument:
        return _STANDARD[name](data_dir)
    raise UsageError(f"Unknown data {spec!r}: choose from {', '.join(NAMES)}.")


def absolute(spec: str) -> str:
    """`spec` with the full path of its file, if it has one."""
    name, _, argument = spec.partition(":")
    return f"{name}:{Path(argument).resolve()}" if name in _FROM_FILE else spec


def short(spec: str) -> str:
    """`spec` with the name of its file alone."""
    name, _, argument = spec.partition(":")
    return f"{name}:{_shown(Path(argument))}" if name in _FROM_FILE else spec


def is_same_task(spec: str, other: str) -> bool:
    """Whether they are the same but for the place of a file."""
    kinds = {spec.partition(":")[0], other.partition(":")[0]}
    return absolute(spec) == absolute(other) or (len(kinds) == 1 and kinds <= _FROM_FILE.keys())


def _shown(path: Path) -> str:
    """The file's name as text that every picture can hold."""
    return path.name.encode(errors="backslashreplace").decode()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def _reading(path: Path, form: str) -> Iterator[None]:
    """Turns whatever a reader raises on a broken file into one sentence."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UsageError(f"{path} could not be read as {form}: {reason}.") from error


def _classes(name: str, x_train: Array, y_train: Array, x_test: Array, y_test: Array, k: int = 10) -> Dataset:
    """A classification task from arrays; images come as `(N, C, H, W)`."""
    if not (len(x_train) and len(x_test)):
        raise UsageError(f"{name} has {len(x_train)} training and {len(x_test)} test samples: both need at least one.")
    x = [_float32(name, a) for a in (x_train, x_test)]
    y = [torch.from_numpy(np.ascontiguousarray(a, np.int64)) for a in (y_train, y_test)]
    return Dataset(name, "classification", x[0], y[0], x[1], y[1], k)


def _float32(name: str, array: Array) -> Tensor:
    with np.errstate(over="ignore"):
        x = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    if not x.isfinite().all():
        raise UsageError(f"{name} has values that are not finite or too large for float32.")
    return x


def _standardize(train: Array, test: Array) -> tuple[Array, Array]:
    """Both arrays with the training columns' mean 0 and deviation 1; constant columns become 0."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by `_float32`
        constant = train.max(0) == train.min(0)
        scale = np.where(constant, 1, np.abs(train).max(0))  # no square of an entry is too large or too small
        train, test = train / scale, test / scale
        mean = np.where(constant, train[0], train.mean(0))
        deviation = np.where(constant, 1, train.std(0))
        return (train - mean) / deviation, (test - mean) / deviation


# Standard tasks


def _digits(data_dir: Path) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    images = x.reshape(-1, 1, 8, 8) / 16
    x_train, x_test, y_train, y_test = train_test_split(images, y, test_size=0.2, stratify=y, random_state=SPLIT_SEED)
    return _classes("digits", x_train, y_train, x_test, y_test)


def _sine(frequency: float) -> Dataset:
    """y = sin(frequency·x) + 0.01·noise on [−1, 1], 7,000 training and 3,000 test points."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    x = 2 * torch.rand(10_000, 1, generator=generator) - 1
    y = torch.sin(frequency * x) + 0.01 * torch.randn(10_000, 1, generator=generator)
    if not y.isfinite().all():
        raise UsageError(f"--data sine:{frequency:g} is too fast for float32.")
    return Dataset(f"sine-{frequency:g}", "regression", x[:7000], y[:7000], x[7000:], y[7000:])


def _idx(path: Path) -> Array:
    """A gzipped idx file of unsigned bytes: two zeros, type 8, rank, then big-endian sizes."""
    with _reading(path, "a gzipped idx file"):
        content = gzip.decompress(path.read_bytes())
        if content[:3] != b"\0\0\x08":
            raise UsageError(f"{path} is no idx file of unsigned bytes.")
        rank = content[3]
        shape = np.frombuffer(content, ">i4", rank, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _idx_images(name: str, data_dir: Path) -> Dataset:
    kinds = ("images-idx3", "labels-idx1")
    files = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in kinds]
    folder = next((d for d in (data_dir / name, data_dir) if all((d / f).is_file() for f in files)), None)
    if folder is None:
        place = data_dir / name
        raise UsageError(f"The {name} files are missing: put {', '.join(files)} into {place}, or give --data-dir.")
    x_train, y_train, x_test, y_test = (_idx(folder / file) for file in files)
    if len(x_train) != len(y_train) or len(x_test) != len(y_test):
        raise UsageError(f"The {name} files in {folder} hold different numbers of images and labels.")
    x_train, x_test = (x[:, None] / np.float32(255) for x in (x_train, x_test))
    return _classes(name, x_train, y_train, x_test, y_test)


def _cifar10(data_dir: Path) -> Dataset:
    """The python batches (data_batch_1 … test_batch), or else every .npz: see `torchnewton.train.cifar`."""
    batches = cifar.find_batches([data_dir / "cifar-10-batches-py", data_dir / "cifar10", data_dir])
    if batches is not None:
        parts = []
        for file in (*batches[0], batches[1]):
            with _reading(file, "a CIFAR-10 batch"):
                parts.append(cifar.read_batch(file))
        x, y = (np.concatenate([part[i] for part in parts[:-1]]) for i in (0, 1))
        return _classes("cifar10", x, y, *parts[-1])
    files = sorted((data_dir / "cifar10").glob("*.npz")) or sorted(data_dir.glob("cifar10*.npz"))
    if not files:
        raise UsageError(
            "The cifar10 files are missing: put the python batches (data_batch_1 to data_batch_5, test_batch), or .npz "
            f"files with x_train (N×32×32×3, uint8) and y_train, into {data_dir / 'cifar10'}, or give --data-dir."
        )
    with _reading(files[0], "an .npz file with arrays x_train and y_train"):
        return _classes("cifar10", *cifar.read_npz(files))


# Tasks from a file of the user


def _libsvm(path: Path) -> Dataset:
    """Classification, features standardized; the test set is FILE.t where it exists, else a fifth of FILE."""
    from sklearn.datasets import load_svmlight_files
    from sklearn.model_selection import train_test_split

    test_path = path.with_name(path.name + ".t")
    with _reading(path, "a LIBSVM file (label index:value …)"):
        if test_path.is_file():
            x_train, y_train, x_test, y_test = load_svmlight_files([str(path), str(test_path)])
        else:
            x, y = load_svmlight_files([str(path)])
            if len(y) < 2:
                raise UsageError(f"{path} needs at least 2 rows, or a file {test_path.name} with test rows beside it.")
            x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, random_state=SPLIT_SEED)
        for file, y in ((path, y_train), (test_path, y_test)):
            if not len(y):
                raise UsageError(f"{file} has no rows.")
        rows, features = x_train.shape[0] + x_test.shape[0], x_train.shape[1]
        if rows * features > MAX_ENTRIES:
            size = f"{rows:,} rows of {features:,} features"
            raise UsageError(f"{path} has {size}: more than {MAX_ENTRIES:,} entries do not fit.")
        x_train, x_test = _standardize(x_train.toarray(), x_test.toarray())
    labels = np.concatenate([y_train, y_test])
    if not np.isfinite(labels).all() or (labels != labels.round()).any():
        raise UsageError(f"{path} has labels that are no whole numbers, so it is no classification task.")
    names, numbers = np.unique(labels, return_inverse=True)
    cut = len(y_train)
    return _classes(_shown(path), x_train, numbers[:cut], x_test, numbers[cut:], len(names))


def _table(path: Path) -> Dataset:
    """Regression on the last column; a tenth of the rows is the test set; all columns are standardized."""
    with _reading(path, "a table of numbers (columns split by spaces, commas or semicolons, the target last)"):
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig") as file
        ):
            first = next((row for line in file if (row := line.partition("#")[0].strip())), "")
        delimiter = next((mark for mark in ";," if mark in first), None)
        words = [word for cell in first.split(delimiter) if (word := cell.strip()) and not _is_number(word)]
        if words:
            raise UsageError(f"{path} has {words[0]!r} in its first row: remove the header, and write numbers as 1.5.")
        table = np.loadtxt(path, delimiter=delimiter, ndmin=2, encoding="utf-8-sig")
    if table.shape[0] < 10 or table.shape[1] < 2 or not np.isfinite(table).all():
        raise UsageError(f"{path} needs at least 10 rows and 2 columns of finite numbers.")
    table = table[np.random.default_rng(SPLIT_SEED).permutation(len(table))]
    cut = round(0.9 * len(table))
    parts = [_float32(str(path), a) for a in _standardize(table[:cut], table[cut:])]
    (x_train, y_train), (x_test, y_test) = ((a[:, :-1].contiguous(), a[:, -1:].contiguous()) for a in parts)
    return Dataset(_shown(path).split(".")[0], "regression", x_train, y_train, x_test, y_test)


def _text(path: Path) -> Dataset:
    """Next-character prediction on windows; the first nine tenths of the text are for training."""
    with _reading(path, "UTF-8 text"):
        characters = path.read_text(encoding="utf-8")
    if len(characters) < 20 * WINDOW:
        raise UsageError(f"{path} needs at least {20 * WINDOW} characters.")
    vocabulary, numbers = np.unique(list(characters), return_inverse=True)
    cut = len(numbers) * 9 // 10
    (x_train, y_train), (x_test, y_test) = (_windows(part) for part in (numbers[:cut], numbers[cut:]))
    return Dataset(_shown(path.with_suffix("")), "text", x_train, y_train, x_test, y_test, len(vocabulary))


def _windows(numbers: Array) -> tuple[Tensor, Tensor]:
    """Windows one after the other, and the same windows one character on."""
    count = (len(numbers) - 1) // WINDOW
    ids = torch.from_numpy(numbers.astype(np.int64))
    return ids[: count * WINDOW].view(count, WINDOW), ids[1 : count * WINDOW + 1].view(count, WINDOW)


_STANDARD: dict[str, Callable[[Path], Dataset]] = {
    "digits": _digits,
    "mnist": lambda data_dir: _idx_images("mnist", data_dir),
    "fashion-mnist": lambda data_dir: _idx_images("fashion-mnist", data_dir),
    "cifar10": _cifar10,
}
_FROM_FILE: dict[str, Callable[[Path], Dataset]] = {"libsvm": _libsvm, "table": _table, "text": _text}
NAMES = [*_STANDARD, "sine", "sine:FREQUENCY", *(f"{name}:FILE" for name in _FROM_FILE)]
