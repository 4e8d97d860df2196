"""The files of CIFAR-10: the python batches of its authors, or `.npz`."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SIDE = 32

# All that an array, a list and a dictionary need.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class _Unpickler(pickle.Unpickler):
    """Builds arrays and containers; a pickle that asks for anything else is refused before it can run."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler.find_class`."""
        try:
            return _ALLOWED[module, name]
        except KeyError as error:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a CIFAR batch") from error


def find_batches(folders: Sequence[Path]) -> tuple[list[Path], Path] | None:
    """`data_batch_1` to `data_batch_5` and `test_batch` in the first of the folders that has them."""
    for folder in folders:
        train = [folder / f"data_batch_{k}" for k in range(1, 6)]
        test = folder / "test_batch"
        if all(file.is_file() for file in (*train, test)):
            return train, test
    return None


def read_batch(file: Path) -> tuple[Array, Array]:
    """Images N×3×32×32 from 0 to 1 and class numbers N of a pickled batch."""
    content = _Unpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
    entries = {key if isinstance(key, bytes) else str(key).encode(): value for key, value in content.items()}
    x, y = np.asarray(entries[b"data"]), np.asarray(entries[b"labels"], np.int64)
    if x.dtype != np.uint8 or x.shape != (len(y), 3 * SIDE * SIDE):
        raise ValueError(f"data is {x.dtype} of shape {x.shape}, not uint8 of ({len(y)}, {3 * SIDE * SIDE})")
    return x.reshape(-1, 3, SIDE, SIDE) / np.float32(255), y


def read_npz(files: Sequence[Path]) -> tuple[Array, Array, Array, Array]:
    """`x_train` N×32×32×3, `y_train`, `x_test`, `y_test` of all files; without `x_test` the last eighth is held out."""
    parts: dict[str, list[Array]] = {"x_train": [], "y_train": [], "x_test": [], "y_test": []}
    for file in files:
        with np.load(file) as arrays:
            for key, part in parts.items():
                if key in arrays or key.endswith("_train"):
                    value = arrays[key]
                    part.append(value.transpose(0, 3, 1, 2) / np.float32(255) if key[0] == "x" else value)
    x, y = np.concatenate(parts["x_train"]), np.concatenate(parts["y_train"])
    if parts["x_test"]:
        return x, y, np.concatenate(parts["x_test"]), np.concatenate(parts["y_test"])
    cut = len(x) - len(x) // 8
    return x[:cut], y[:cut], x[cut:], y[cut:]
