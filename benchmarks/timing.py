"""Interleaved measurements of CPU time."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

ROUNDS = 15
SHORTEST = 0.02  # seconds: shorter work is repeated within one measurement
LONG, VERY_LONG = 1.0, 4.0
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # <malloc.h>

Work = Mapping[str, Callable[[], Any]]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: fetching pages anew for every large tensor is slow and noisy."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def measure(work: Work, rounds: int = ROUNDS) -> dict[str, float]:
    """Median CPU seconds of each, measured in turn after a first call.

    The first call counts for work of more than `LONG` seconds, which is called once more, and not again above
    `VERY_LONG`.
    """
    first = {name: seconds(f) for name, f in work.items()}
    repeats = {name: 1 if t > SHORTEST else max(1, round(SHORTEST / seconds(work[name]))) for name, t in first.items()}
    times: dict[str, list[float]] = {name: [t] if t > LONG else [] for name, t in first.items()}
    for number in range(rounds):
        for name, f in work.items():
            if first[name] <= (LONG if number else VERY_LONG):
                times[name].append(seconds(f, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(f: Callable[[], Any], repeats: int = 1) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    for _ in range(repeats):
        f()
    return (time.process_time() - start) / repeats
