"""What the studies of delays, local entropy and workers share: rows on disk, a network, a section of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.store import about
from torchnewton.train.data import Dataset
from torchnewton.train.figures import STYLE
from torchnewton.train.loop import loss_function
from torchnewton.train.models import build

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


class Rows:
    """Rows in a JSON-lines file, each with the key it was measured for; what is there is not measured again."""

    def __init__(self, name: str) -> None:
        self.path = ROOT / f"benchmarks/results/studies/{name}.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.rows = {json.dumps(row["key"]): row for row in map(json.loads, lines)}

    def get(self, key: Row, measure: Callable[[], Row]) -> Row:
        name = json.dumps(key)
        if name not in self.rows:
            row = {"key": key, **measure(), "about": about()}
            self.rows[name] = row
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(key, {k: v for k, v in row.items() if isinstance(v, float)}, flush=True)
        return self.rows[name]

    def machine(self) -> str:
        found = [row["about"] for row in self.rows.values()]
        parts = (", ".join(sorted({row[name] for row in found})) for name in ("date", "cpu", "torch"))
        date, cpu, version = parts
        return f"Measured {date} on {cpu} with torch {version}, other programs running beside."


def network(spec: str, data: Dataset, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(spec, data)


def batches(data: Dataset, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffles without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.x_train), generator=generator)
        for index in order.split(size):
            if len(index) == size:
                yield data.x_train[index], data.y_train[index]


def closure_over(model: nn.Module, stream: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
    """Draws a batch in each call."""

    def closure() -> Tensor:
        x, y = next(stream)
        model.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        return loss

    return closure


@torch.no_grad()
def measured(model: nn.Module, data: Dataset) -> tuple[float, float]:
    """The loss over at most 10,000 training samples, and the test error."""
    loss = float(loss_function(model(data.x_train[:10_000]), data.y_train[:10_000]))
    return loss, float((model(data.x_test).argmax(-1) != data.y_test).float().mean())


def save(figure: Figure, name: str) -> None:
    with mpl.rc_context(STYLE):
        path = ROOT / f"docs/figures/{name}.svg"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def write_section(page: str, name: str, text: str) -> None:
    """Puts the text between the markers of the page."""
    path = ROOT / "docs" / page
    begin, end = f"<!-- {name}: measured -->", f"<!-- {name}: end -->"
    old = path.read_text(encoding="utf-8")
    if begin not in old:
        raise SystemExit(f"{path} has no line {begin}")
    new = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", old, flags=re.DOTALL)
    path.write_text(new, encoding="utf-8")
    print(f"Written: {path}")
