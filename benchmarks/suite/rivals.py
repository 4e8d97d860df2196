"""Optimizers of others: torchzero and torch-levenberg-marquardt, as their documentation says to use them.

Without these packages the tasks run without them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.suite.measure import Step
from benchmarks.suite.problems import Training
from benchmarks.suite.task import Entry
from torchnewton.record import record

TORCHZERO, LEVENBERG = "torchzero", "torch-levenberg-marquardt"
PACKAGES = {"torchzero": TORCHZERO, "tlm": LEVENBERG}  # by the beginning of a method's name


def package(entry: Entry) -> str | None:
    """The package an entry needs."""
    return next((name for prefix, name in PACKAGES.items() if entry.method.startswith(prefix)), None)


def is_missing(entry: Entry) -> bool:
    """Whether its package is not installed."""
    name = package(entry)
    try:
        return name is not None and not version(name)
    except PackageNotFoundError:
        return True


@contextmanager
def _counted_grads() -> Any:
    """Counts the calls of `torch.autograd.grad`, which are Hessian products here."""
    calls, grad = [0], torch.autograd.grad

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return grad(*args, **kwargs)

    with patch("torch.autograd.grad", counting):
        yield calls


def torchzero_newton_cg(batch: int | None, max_iterations: int = 10) -> Entry:
    """Truncated Newton with backtracking: CG on the Hessian.

    Work: one gradient for a call of the closure with a backward pass, a third without, two for a Hessian product.
    """

    def start(training: Training, size: int | None, constant: float) -> Step:
        import torchzero as tz

        cg, search = tz.m.NewtonCG(maxiter=max_iterations), tz.m.Backtracking(init=constant)
        optimizer, batches = tz.Optimizer(training.model.parameters(), cg, search), training.batches(size)

        def step() -> float:
            data, work = next(batches), 0.0

            def closure(backward: bool = True) -> Tensor:
                nonlocal work
                work += 1 if backward else 1 / 3
                with torch.enable_grad():  # a loss may have derivatives inside, and trial points come without
                    loss = training.loss(data)
                if backward:
                    optimizer.zero_grad()
                    loss.backward()
                return loss

            with _counted_grads() as products, sdpa_kernel(SDPBackend.MATH):  # which has second derivatives
                optimizer.step(closure)
            # the gradient that CG differentiates is such a call, too
            return work + (1 + 2 * (products[0] - 1) if products[0] else 0.0)

        return step

    return Entry("torchzero-newton-cg", f"torchzero, Newton-CG ({max_iterations} iterations)", start, batch)


def torchzero_levenberg(batch: int | None) -> Entry:
    """Gauss-Newton in its Levenberg-Marquardt trust region, for squared errors of one output.

    Work: a backward pass, two thirds of a gradient, for each residual, and the operations of JᵀJ and of the solve.
    """

    def start(training: Training, size: int | None, constant: float) -> Step:
        import torchzero as tz

        region = tz.m.LevenbergMarquardt(tz.m.GaussNewton(), init=constant)
        optimizer, batches = tz.Optimizer(training.model.parameters(), region), training.batches(size)
        flops = _flops(training, size)

        def step() -> float:
            x, y = next(batches)
            calls = 0

            def closure(backward: bool = True) -> Tensor:
                nonlocal calls
                calls += 1
                return (training.model(x) - y).flatten() / math.sqrt(y.numel())

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step(closure)
            return calls / 3 + 2 / 3 * y.numel() + flops(y.numel(), "solve", calls)

        return step

    return Entry("torchzero-lm", "torchzero, Levenberg-Marquardt", start, batch)


def levenberg_marquardt(
    batch: int | None,
    loss: Literal["MSELoss", "CrossEntropyLoss"] = "MSELoss",
    learning_rate: float = 1.0,
    solver: Literal["qr", "solve"] = "solve",
    max_batch_size: int | None = None,
) -> Entry:
    """torch-levenberg-marquardt's training module; a residual is a value, or the root of a sample's cross entropy.

    Work: a row of the Jacobian for each residual, one backward pass of the batch for each output, an evaluation for
    each attempt, and the operations of JᵀJ and of the attempts' factorizations.
    """

    def start(training: Training, size: int | None, constant: float) -> Step:
        import torch_levenberg_marquardt as tlm

        damping = tlm.damping.StandardDampingStrategy(starting_value=1e-3 * constant)
        module = tlm.training.LevenbergMarquardtModule(
            training.model,
            getattr(tlm.loss, loss)(),
            damping,
            learning_rate=learning_rate,
            attempts_per_step=10,
            solve_method=solver,
            max_batch_size=max_batch_size,
        )
        batches, flops = training.batches(size), _flops(training, size)

        def step() -> float:
            x, y = next(batches)
            _, _, stop, logs = module.training_step(x, y)
            if stop:  # its own end of training; we go on from where it started
                damping.reset()
            rows = y.numel()
            outputs = rows // len(y)
            return (1 + 2 * outputs + logs["attempts"]) / 3 + flops(rows, solver, logs["attempts"])

        return step

    return Entry("tlm", "torch-levenberg-marquardt", start, batch)


def _flops(training: Training, size: int | None) -> Callable[[int, str, int], float]:
    """Operations of the dense algebra in gradients of a batch: of rows JᵀJ (or JJᵀ) and of factorizations."""
    params = list(training.model.parameters())
    batch = next(training.batches(size))
    gradient = max(3 * record(lambda: training.loss(batch), params).forward_flops, 1.0)
    n = sum(p.numel() for p in params)

    def work(rows: int, solver: str, solves: int) -> float:
        small, large = sorted((rows, n))
        each = (8 / 3 if solver == "qr" else 2 / 3) * small**3
        return (2 * large * small**2 + solves * each) / gradient

    return work
