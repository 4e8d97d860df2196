"""The methods as entries of a task, each with the batch it is usually run with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import torchnewton as tn
from benchmarks.suite import rivals
from benchmarks.suite.measure import Step
from benchmarks.suite.problems import Batch, Training
from benchmarks.suite.task import Entry, Start
from torchnewton.train.data import Dataset
from torchnewton.train.methods import METHODS, default_batch_size

Make = Callable[[nn.Module, float], torch.optim.Optimizer]
Kind = Literal["regression", "classification", "text"]
FIRST_ORDER = ("sgd", "adam", "adamw", "muon")
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SGD_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
ALL = 10_000  # samples up to which a step may look at all of them


def closure_of(optimizer: torch.optim.Optimizer, training: Training, batch: Batch) -> Callable[[], Tensor]:
    """The closure of a training loop."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = training.loss(batch)
        loss.backward()
        return loss

    return closure


def with_closure(make: Make) -> Start:
    """One call of `optimizer.step(closure)` a batch; its work is that of the report, else the calls."""

    def start(training: Training, batch: int | None, constant: float) -> Step:
        optimizer, batches = make(training.model, constant), training.batches(batch)

        def step() -> float:
            closure, calls = closure_of(optimizer, training, next(batches)), 0

            def counted() -> Tensor:
                nonlocal calls
                calls += 1
                return closure()

            optimizer.step(counted)
            report = getattr(optimizer, "report", None)
            return report.gradient_equivalents if report else calls

        return step

    return start


def with_part(make: Callable[[nn.Module, float], tn.Newton], share: float) -> Start:
    """The gradient of the batch, the curvature of a part of all samples, another one each step."""

    def start(training: Training, batch: int | None, constant: float) -> Step:
        optimizer, batches = make(training.model, constant), training.batches(batch)
        parts = training.batches(max(1, round(share * training.size)))

        def step() -> float:
            closure = closure_of(optimizer, training, next(batches))
            optimizer.step(closure, curvature=closure_of(optimizer, training, next(parts)))
            report = optimizer.report
            own = 1 + report.loss_evaluations / 3
            return own + share * max(0.0, report.gradient_equivalents - own)  # the rest is products on the part

        return step

    return start


def usual_batch(method: str, kind: Kind, samples: int, convolutional: bool = False) -> int | None:
    """The batch of `torchnewton`'s command line for data of this kind and size."""
    shape = torch.empty(samples, 0)  # takes no memory
    size = default_batch_size(method, Dataset("", kind, shape, shape, shape, shape), convolutional=convolutional)
    return None if size >= samples else size


def newton(batch: int | None) -> Entry:
    def make(model: nn.Module, factor: float) -> torch.optim.Optimizer:
        optimizer = tn.Newton(model.parameters())
        if factor != 1:  # for the sensitivity
            rule: Any = optimizer.damping
            optimizer.damping = replace(rule, initial=factor * rule.initial)
        return optimizer

    return Entry("newton", "Newton", with_closure(make), batch)


def sgn(batch: int | None, max_iterations: int, seconds: float | None = None) -> Entry:
    """`seconds` for as long a run as the published ones."""

    def make(model: nn.Module, factor: float) -> torch.optim.Optimizer:
        return tn.SGN(model.parameters(), max_iterations=max_iterations, damping=1e-4 * factor)

    method, label = "sgn", f"SGN, {max_iterations} CG iterations"
    if seconds is not None:
        method, label = "sgn-long", f"{label}, {seconds:g} s"
    return Entry(method, label, with_closure(make), batch, seconds=seconds)


def newton_cg(
    name: str = "",
    *,
    weight_decay: float = 0.0,
    damping: float = 1.0,
    rtol: float = 0.1,
    share: float = 0.05,
    seconds: float | None = None,
) -> Entry:
    """The gradient of all samples, the curvature of 5 % of them; `name` for other constants than the published."""

    def make(model: nn.Module, factor: float) -> tn.Newton:
        return tn.NewtonCG(model.parameters(), damping=damping * factor, rtol=rtol, weight_decay=weight_decay)

    method = f"newton-cg-{name}" if name else "newton-cg"
    return Entry(method, f"Newton-CG{name and ', '}{name}", with_part(make, share), None, seconds=seconds)


def lbfgs(batch: int | None, max_iterations: int = 20) -> Entry:
    """`max_iterations` a step: how often the time is looked at, the method goes on where it was."""

    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=max_iterations, line_search_fn="strong_wolfe")

    if batch is None:
        return Entry("lbfgs", "L-BFGS", with_closure(make), None)
    return Entry(f"lbfgs-{batch}", "L-BFGS, mini-batches", with_closure(make), batch)


def sgd(batch: int | None, rates: tuple[float, ...] = SGD_RATES) -> Entry:
    return Entry("sgd", "SGD, momentum 0.9", with_closure(METHODS["sgd"].make), batch, rates)


def adam(batch: int | None, rates: tuple[float, ...] = ADAM_RATES) -> Entry:
    return Entry("adam", "Adam", with_closure(METHODS["adam"].make), batch, rates)


def adamw(batch: int | None, rates: tuple[float, ...] = ADAM_RATES) -> Entry:
    def make(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr)

    return Entry("adamw", "AdamW", with_closure(make), batch, rates)


def muon(batch: int | None, rates: tuple[float, ...] = ADAM_RATES) -> Entry:
    return Entry("muon", "Muon", with_closure(METHODS["muon"].make), batch, rates)


def first_order(
    batch: int | None, sgd_rates: tuple[float, ...] = SGD_RATES, rates: tuple[float, ...] = ADAM_RATES
) -> tuple[Entry, ...]:
    return sgd(batch, sgd_rates), adam(batch, rates), adamw(batch, rates), muon(batch, rates)


def usual(
    kind: Kind,
    samples: int,
    *,
    cg_iterations: int = 10,
    sgd_rates: tuple[float, ...] = SGD_RATES,
    rates: tuple[float, ...] = ADAM_RATES,
    lbfgs_batches: Sequence[int | None] | None = None,
    lbfgs_iterations: int = 20,
    weight_decay: float = 0.0,
    newton_cg_seconds: float | None = None,
    sgn_seconds: float | None = None,
    first_order_batch: int | None = None,
    newton_batch: int | None = None,
    levenberg: Entry | None = None,
    convolutional: bool = False,
) -> tuple[Entry, ...]:
    """Every method that fits a task with so many samples; `weight_decay` is that of Newton-CG.

    With `sgn_seconds` SGN has also so long a run with the batch of its authors.

    Newton-CG looks at all samples, so it is there up to 10,000; L-BFGS takes mini-batches of 10,000 above.
    """
    batch = partial(usual_batch, kind=kind, samples=samples, convolutional=convolutional)
    batches = lbfgs_batches or [None if samples <= ALL else ALL]
    return (
        newton(newton_batch or batch("newton")),
        sgn(batch("sgn"), cg_iterations),
        *([sgn(1000, cg_iterations, sgn_seconds)] if sgn_seconds is not None else []),
        *([newton_cg(weight_decay=weight_decay, seconds=newton_cg_seconds)] if samples <= ALL else []),
        *(lbfgs(size, lbfgs_iterations) for size in batches),
        *first_order(first_order_batch or batch("adam"), sgd_rates, rates),
        rivals.torchzero_newton_cg(batch("newton")),
        *([levenberg] if levenberg else []),
    )
