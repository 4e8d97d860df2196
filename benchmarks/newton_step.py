"""The average step of `Newton()` in its plane regime: gliding, statistics, inverses and checks included."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

import torchnewton as tn
from benchmarks.cases import Images
from benchmarks.timing import seconds
from torchnewton.optim.regime import RegimeChoice
from torchnewton.train.loop import loss_function

STEPS = 400


def measure_newton_steps(model: nn.Module, data: Images, batch: int) -> dict[str, Any]:
    """Mean CPU seconds of a step and of a gradient on the same batches, from the first step on.

    Trials of exact steps are left out, whatever a factorization would cost. `gliding` is the share of the steps that
    evaluated no loss beside their gradient's.
    """
    params = list(model.parameters())
    optimizer = tn.Newton(params)
    optimizer.choice = RegimeChoice(gradients=0.0, flops=0.0)
    total: dict[str, float] = defaultdict(float)
    gliding, losses = 0, []
    for _ in range(STEPS):
        index = torch.randint(len(data.x), (batch,))
        x, y = data.x[index], data.y[index]

        def loss(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return loss_function(model(x), y)

        total["gradient"] += seconds(lambda loss=loss: torch.autograd.grad(loss(), params))
        total["step"] += seconds(lambda loss=loss: optimizer.step(loss))
        gliding += optimizer.report.loss_evaluations == 0
        losses.append(optimizer.report.loss)
    means = {name: t / STEPS for name, t in total.items()}
    return {"seconds": means, "gliding": gliding / STEPS, "losses": [losses[0], sum(losses[-10:]) / 10]}
