"""The planner's bytes and messages are those that a step's report counts."""

from __future__ import annotations

import pytest
import torch
from exchange_cases import DTYPES, ITERATIONS, MIN_ITERATIONS, SAMPLES, SIZES, make_model, second_step
from ranks import launch

from torchnewton.train.exchanges import MODES, Step, exchanges, mesh_of, total


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    found = {size: launch("exchange_cases", size, tmp_path_factory)[0]["on_steps"] for size in (2, 4)}
    alone = {(mode, dtype): second_step(mode, dtype, 0, 1) for mode in MODES[:3] for dtype in DTYPES}
    return {1: alone, **found}


@pytest.mark.parametrize(
    ("mode", "size"), [(mode, size) for mode in MODES for size in (1, 2, 4) if size > 1 or mode != "partitioned"]
)
def test_bytes_and_messages_are_those_of_the_report(mode, size, counted):
    num_parameters = sum(p.numel() for p in make_model(torch.float32).parameters())
    for dtype in DTYPES:
        num_bytes, messages, evaluations = counted[size][mode, dtype]
        step = Step(num_parameters, dtype.itemsize, ITERATIONS, evaluations, MIN_ITERATIONS, SIZES, SAMPLES)
        assert total(exchanges(mode, step, size)) == (num_bytes, messages)
        assert (num_bytes > 0) == (size > 1)


def test_meshes_are_nearly_square():
    assert [mesh_of(n) for n in (1, 2, 4, 6, 7, 1024)] == [(1, 1), (2, 1), (2, 2), (3, 2), (7, 1), (32, 32)]
