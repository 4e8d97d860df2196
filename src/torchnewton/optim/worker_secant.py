"""A Newton-Raphson step whose inverse Hessian comes from the differences between workers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.distributed import Workers, find_workers, fingerprint
from torchnewton.optim.complete_state import CompleteState, as_before, first_parameter
from torchnewton.optim.evaluation import (
    Calls,
    StepFailedError,
    all_or_nothing,
    check_ranges,
    decayed,
    needed,
    put,
    trainable,
)
from torchnewton.optim.report import StepReport
from torchnewton.optim.secant import FORMS, Form, SecantSolve, Slice
from torchnewton.record import BufferSnapshot, Closure

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pairs = list[tuple[Tensor, dict[str, Any]]]
Rounds = list[list[list[Tensor]]]  # of each its slices here, of each the workers' points and gradients
REASONS = ("", "the loss is not finite", "the gradient is not finite", "its local steps left the finite numbers")


class WorkerSecant(CompleteState):
    """Local steps on m workers, then one Newton-Raphson step: θ ← θ̄ − S c − η(ḡ − Y c).

    A round, which is one `step(closure)`: each worker i starts at θ, takes `local_steps` gradient steps of rate η on
    batches of its own to θᵢ, and there a gradient gᵢ. With S = [θᵢ − θ̄] and Y = [gᵢ − ḡ] the Hessian maps S to Y, so
    that S c is the Newton-Raphson step for Y c, the part of ḡ that the differences explain; a gradient step goes along
    the rest.

        multi-secant   c = (YᵀY)⁺Yᵀḡ: Y c is the projection of ḡ on the span of Y
        symmetric      c = (SᵀY)⁺Sᵀḡ: H⁻¹ ≈ S(SᵀY)⁺Sᵀ, with ½(SᵀY + YᵀS) for SᵀY

    The pseudo-inverse is that of an eigen-decomposition of the matrix scaled to a unit diagonal, in float64:
    eigenvalues up to `cutoff` times the largest are left out. On a quadratic with m − 1 ≥ its dimension and gradients
    without noise one round ends at the minimum.

    **The closure draws a fresh batch in each call**: it is called `local_steps` + 1 times for each worker and round.
    With `process_group` each rank is one worker, which draws from its own data; on one process the `num_workers`
    workers run one after another, with the same numbers for the same batches.

    Args:
        params: parameters or parameter groups; a group may set `lr`, `rest_lr` and `weight_decay`.
        lr: η of the local steps.
        rest_lr: η along the rest; that of the local steps.
        local_steps: how many, at least 1.
        num_workers: m of the simulation on one process.
        process_group: the ranks that work together; without both, the default group.
        form: `multi-secant` or `symmetric`.
        past_rounds: how many earlier rounds' points stay in S and Y, so that m may exceed the number of ranks; those
            of the same trained parameters.
        descent: leave out pairs with sᵀy ≤ 0, and the Newton-Raphson step where the result would not point downhill.
        cutoff: see above; 10·(number of pairs)·(machine precision of the parameters).
        damping: is added to the matrix, relative to its largest eigenvalue.
        radius: the greatest length of S c, relative to the longest θᵢ − θ̄ of the round; infinite.
        weight_decay: w, adds ½w‖θ‖² to the loss.

    A worker whose loss, gradient or parameters are not finite is left out of the round, and `report.status` names it.
    Where none is left, or the new parameters are not finite, the step is rejected: all stays as it was, bit for bit.
    Where other parameters are trained than before, earlier rounds are forgotten.
    Floating-point buffers (BatchNorm) become the mean over the workers. What `torch.compile` has made runs as eager
    code. `report.inner_iterations` is the rank of the solve, `report.bytes_communicated` what a worker has sent. Every
    rank has its own `state_dict` (its slices of earlier rounds): save all of them, and resume with as many ranks.

    Errors: `ValueError` for arguments, a group of another size, ranks that start with other parameters, no closure, or
    a closure without `backward()`.
    Cost of a round for a worker: `local_steps` + 1 gradients; 3n(m − 1)/m numbers sent: θᵢ and gᵢ to the owners of
    slices by all-to-all, and the new θ back; Gram matrices of (2m + 2)² numbers are gathered. Memory: 4 + 2·(rounds
    kept) vectors, on one process m times as many.
    Source: Arnold, Wang, "Accelerating SGD for Distributed Deep-Learning Using Approximated Hessian Matrix", arXiv
    1709.05069: the idea, from its abstract. Derived, not stated there: both forms, the guards, earlier rounds.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.1,
        rest_lr: float | None = None,
        local_steps: int = 1,
        num_workers: int | None = None,
        process_group: ProcessGroup | None = None,
        form: Form = "multi-secant",
        past_rounds: int = 0,
        descent: bool = True,
        cutoff: float | None = None,
        damping: float = 0.0,
        radius: float = math.inf,
        weight_decay: float = 0.0,
    ) -> None:
        check_ranges(
            "WorkerSecant",
            local_steps=(local_steps, 1, math.inf),
            past_rounds=(past_rounds, 0, math.inf),
            cutoff=(0.0 if cutoff is None else cutoff, 0, 1),
            damping=(damping, 0, math.inf),
        )
        if not radius > 0:
            raise ValueError(f"WorkerSecant: radius={radius} must be greater than 0.")
        if form not in FORMS:
            raise ValueError(f"WorkerSecant: form={form!r} must be one of {', '.join(FORMS)}.")
        super().__init__(params, {"lr": lr, "rest_lr": rest_lr, "weight_decay": weight_decay})
        self.workers: Workers = find_workers(num_workers, process_group)
        self.local_steps, self.past_rounds = local_steps, past_rounds
        self.solve = SecantSolve(form, descent, cutoff, damping, radius)
        self.report = StepReport()
        self._checked = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; the slices of earlier rounds keep their dtype."""
        state_dict = as_before(state_dict)
        kept = [state.pop("rounds") for state in state_dict["state"].values() if "rounds" in state]
        super().load_state_dict(state_dict)  # which casts tensors to the dtype of the first parameter
        if kept:
            device = first_parameter(self).device
            self._memory["rounds"] = [
                [[x.to(device, copy=True) for x in pair] for pair in slices] for slices in kept[0]
            ]

    @property
    def calls_per_step(self) -> int:
        """How often a step calls the closure in this process, each time for a new batch."""
        return len(self.workers.local) * (self.local_steps + 1)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One round; returns the mean of the workers' losses at θ."""
        closure, pairs = needed(closure, self), trainable(self)
        params, memory = [p for p, _ in pairs], self._memory
        self._check_same(params)
        self.report, self.workers.bytes_sent = StepReport(), 0
        trained = self._places(params)
        earlier = memory.get("rounds", []) if memory.get("trained", trained) == trained else []
        try:
            with all_or_nothing(params) as buffers:
                rounds = self._round(closure, pairs, buffers, earlier)
        except StepFailedError as failure:
            self.report.status = f"rejected: {failure}"
        else:
            memory.update(rounds=rounds, trained=trained)
            self.report.accepted, self.report.step_length = True, 1.0
        self.report.bytes_communicated = self.workers.bytes_sent
        return torch.tensor(self.report.loss, dtype=torch.float64)

    def _check_same(self, params: list[Tensor]) -> None:
        """At the first step: all workers start at the same parameters."""
        if not self._checked:
            own = torch.tensor(fingerprint(params), dtype=torch.float64, device=params[0].device)
            told = self.workers.gather([own for _ in self.workers.local])
            other = next((i for i, found in enumerate(told) if not torch.equal(found, told[0])), None)
            if other is not None:
                raise ValueError(
                    f"process_group: the parameters of rank {other} are not those of rank 0: build the model with the "
                    "same seed, or load the same checkpoint."
                )
        self._checked = True

    def _round(self, closure: Closure, pairs: Pairs, buffers: BufferSnapshot, earlier: Rounds) -> Rounds:
        """Local steps of this process's workers, the exchange, the step; the points and gradients to remember."""
        params, workers, report = [p for p, _ in pairs], self.workers, self.report
        start, runs = vectors.clone(params), []
        for _ in workers.local:
            put(params, start)
            buffers.restore()
            runs.append(self._local_run(closure, pairs, buffers))
        told = torch.stack(workers.gather([run.told for run in runs]))
        good = [i for i, code in enumerate(told[:, 0]) if not code]
        bad = [f"worker {i} was dropped: {REASONS[int(code)]}" for i, code in enumerate(told[:, 0]) if code]
        report.loss = float(told[good or slice(None), 1].mean())
        if not good:
            raise StepFailedError("; ".join(["no worker is left", *bad]))
        exchanged = [
            workers.to_slices(torch.stack(rows)) for rows in ([r.point for r in runs], [r.gradient for r in runs])
        ]
        current = [[points[good], gradients[good]] for points, gradients in zip(*exchanged, strict=True)]
        slices = [
            Slice.of(now[0], now[1], rate, [past[i] for past in earlier])
            for i, (now, rate) in enumerate(zip(current, workers.own_slices(_rest_rates(pairs)), strict=True))
        ]
        gram = torch.stack(workers.gather([part.gram() for part in slices])).sum(0)
        report.gradient_norm = float(gram[-2, -2]) ** 0.5
        found = self.solve(gram, len(good), params[0].dtype)
        report.inner_iterations, report.status = found.rank, "; ".join([found.status, *bad])
        new = workers.from_slices([part.moved(found) for part in slices], vectors.num_entries(params))
        if not vectors.is_finite([new]):
            raise StepFailedError("the new parameters are not finite")
        put(params, vectors.unflatten(new, params))
        means = torch.stack(workers.gather([run.buffers for run in runs]))[good].mean(0)
        put(_floating(buffers), vectors.unflatten(means, _floating(buffers)))
        return [*earlier, current][-self.past_rounds :] if self.past_rounds else []

    def _local_run(self, closure: Closure, pairs: Pairs, buffers: BufferSnapshot) -> LocalRun:
        """One worker: its steps, and the gradient where they end; a failure is told, not raised, as others go on."""
        params, report, code = [p for p, _ in pairs], StepReport(), 0
        calls = Calls(closure, params, report)
        gradient = vectors.zeros_like(params)
        try:
            for _ in range(self.local_steps):
                for g, (p, group) in zip(calls(), pairs, strict=True):
                    if g is not None:
                        p.add_(decayed(g, p, group), alpha=-group["lr"])
            found = zip(calls(), pairs, strict=True)
            gradient = [torch.zeros_like(p) if g is None else decayed(g, p, group) for g, (p, group) in found]
        except StepFailedError as failure:
            code = REASONS.index(str(failure))
        if not code and not (vectors.is_finite(params) and vectors.is_finite(gradient)):
            code = len(REASONS) - 1
        self.report.gradient_equivalents += report.gradient_equivalents
        told = torch.tensor([code, report.loss], dtype=torch.float64, device=params[0].device)
        statistics = [b.reshape(-1) for b in _floating(buffers)] or [params[0].new_empty(0)]
        # copies: the next worker of this process moves the same tensors
        return LocalRun(vectors.flatten(params).clone(), vectors.flatten(gradient), told, torch.cat(statistics).clone())

    @property
    def _memory(self) -> dict[str, Any]:
        state: dict[str, Any] = self.state[first_parameter(self)]
        return state


@dataclass(frozen=True)
class LocalRun:
    """What a worker brings home: flat parameters, gradient and buffers; the number of its failure, and its loss."""

    point: Tensor
    gradient: Tensor
    told: Tensor
    buffers: Tensor


def _rest_rates(pairs: Pairs) -> Tensor:
    """η along the rest for every entry."""
    rates = [group["lr"] if group["rest_lr"] is None else group["rest_lr"] for _, group in pairs]
    return torch.cat([p.new_full((p.numel(),), rate) for (p, _), rate in zip(pairs, rates, strict=True)])


def _floating(buffers: BufferSnapshot) -> list[Tensor]:
    """The floating-point buffers of the modules that were called."""
    return [buffer for _, _, buffer, _ in buffers.saved if buffer.is_floating_point()]
