"""Text."""

from __future__ import annotations

from benchmarks.suite.methods import usual
from benchmarks.suite.networks import named
from benchmarks.suite.problems import Supervised
from benchmarks.suite.task import Task
from benchmarks.suite.tasks import data as sets

SEQUENCES = (
    Task(
        "shakespeare",
        "The next character of tinyshakespeare, 65 characters: windows of 64, 15,685 of them for training, "
        "tested on 200 of the last tenth of the text; a causal transformer of width 64 with 2 layers and 4 heads, "
        "cross entropy.",
        "test cross entropy",
        targets=(2.1,),
        published="none for this network",
        seconds=8,
        search_seconds=3,
        search_limit=8,
        limit=24,
        samples=15_685,
        problem=lambda folder: Supervised(
            sets.first(sets.file("text", folder / "text/tinyshakespeare.txt"), None, 200),
            named("transformer"),
            test_loss=True,
        ),
        entries=usual("text", 15_685, first_order_batch=32, lbfgs_batches=(1000,)),
    ),
)
