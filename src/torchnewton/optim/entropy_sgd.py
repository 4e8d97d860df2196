"""Entropy-SGD: descent on the local entropy, its gradient from a Langevin chain around the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchnewton import vectors
from torchnewton.distributed import Processes, gradient_processes
from torchnewton.distributed.layout import as_dtensor, is_shard, laid
from torchnewton.optim.complete_state import CompleteState, as_before, completed, mark_initialized
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
from torchnewton.record import BufferSnapshot, Closure
from torchnewton.vectors import Vector

Pairs = list[tuple[Tensor, dict[str, Any]]]


class EntropySGD(CompleteState):
    """Entropy-SGD: x ← x − η(x − μ), μ the mean of L Langevin steps around x; wide valleys are preferred.

    The chain starts at x' = μ = x; each step draws a fresh batch, so **the closure is called L times a step and has to
    draw the batch itself**:

        x' ← x' − η'(∇f(x') − γ(x − x')) + √η'·ε·N(0, I),      μ ← (1 − a)μ + a·x'

    It descends the negative local entropy −log ∫ exp(−f(x') − γ/2‖x − x'‖²)dx', whose gradient is γ(x − ⟨x'⟩); γ is
    absorbed in η. Scoping: γ = γ₀(1 + γ₁)ᵗ in step t = 0, 1, …. Nesterov momentum outside, and inside anew each step.
    With L = 0 it is `torch.optim.SGD(nesterov=True)`, bit for bit: one call of the closure, η its learning rate.

    Args:
        params: parameters or parameter groups; a group may set all but `inner_steps`.
        lr: η, of the outer step; 1. For L = 0 set it as for SGD.
        inner_steps: L.
        inner_lr: η'.
        scope: γ₀.
        scope_growth: γ₁.
        noise: ε.
        average: a, the weight of the newest sample in μ; sources disagree between ¼ and ¾.
        momentum: of both loops; 0 is none.
        weight_decay: w, adds ½w‖θ‖² to f.

    `optimizer.report` has the loss and gradient norm at x, of the first batch; `step` returns that loss.
    A step with a loss, gradient or sample that is not finite is rejected: parameters, buffers and state stay as they
    were, bit for bit; under DistributedDataParallel or on parameters in parts on all ranks, which also draw the same
    noise. BatchNorm statistics move in each call. What `torch.compile` has made runs as eager code.

    Errors: `ValueError` for arguments out of range, no closure, or a closure without `backward()`.
    Cost: L gradients; memory of four vectors like the parameters.
    Source: Chaudhari et al., "Entropy-SGD: Biasing Gradient Descent Into Wide Valleys", arXiv 1611.01838; update and
    defaults written from the formulas.
    Derived, not stated there: momentum acts on the whole drift ∇f(x') − γ(x − x'), and not on the noise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1.0,
        inner_steps: int = 20,
        inner_lr: float = 0.1,
        scope: float = 0.03,
        scope_growth: float = 1e-3,
        noise: float = 1e-4,
        average: float = 0.25,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        check_ranges("EntropySGD", inner_steps=(inner_steps, 0, math.inf))
        defaults = {
            "lr": lr,
            "inner_lr": inner_lr,
            "scope": scope,
            "scope_growth": scope_growth,
            "noise": noise,
            "average": average,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.inner_steps = inner_steps
        self.report = StepReport()
        mark_initialized(self)

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; complete before the first step, too."""

        def blank(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
            return {"step": 0, "momentum": torch.zeros_like(p)} if group["momentum"] else {"step": 0}

        return completed(self, super().state_dict(), {}, blank)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(as_before(state_dict))

    @property
    def calls_per_step(self) -> int:
        """How often a step calls the closure, each time for a new batch."""
        return max(1, self.inner_steps)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One outer step; returns the loss before it, on the first batch."""
        closure, pairs = needed(closure, self), trainable(self)
        params = [p for p, _ in pairs]
        self.report = StepReport()
        start = vectors.clone(params)
        try:
            with all_or_nothing(params) as buffers:
                together = Together(params, buffers)
                calls = Calls(closure, params, self.report, together.agreed)
                if self.inner_steps:
                    directions = self._chain(calls, pairs, start, together)
                else:
                    directions = self._gradient(calls, pairs)
        except StepFailedError as failure:
            self.report.status = f"rejected: {failure}"
            return calls.returned
        put(params, start)
        for (p, group), d in zip(pairs, directions, strict=True):
            if d is not None:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                d, velocity = nesterov(d, state.get("momentum"), group["momentum"])
                if velocity is not None:
                    state["momentum"] = velocity
                p.add_(d, alpha=-group["lr"])
        self.report.accepted, self.report.step_length = True, 1.0
        return calls.returned

    def _gradient(self, calls: Calls, pairs: Pairs) -> list[Tensor | None]:
        """L = 0: ∇f(x)."""
        return [None if g is None else decayed(g, p, group) for g, (p, group) in zip(calls(), pairs, strict=True)]

    def _chain(self, calls: Calls, pairs: Pairs, start: Vector, together: Together) -> list[Tensor | None]:
        """L Langevin steps, which move the parameters; x − μ for those that were used."""
        means = vectors.clone(start)
        velocities: list[Tensor | None] = [None] * len(start)
        used = [False] * len(start)
        for _ in range(self.inner_steps):
            for i, g in enumerate(calls()):
                if g is not None:
                    (p, group), used[i] = pairs[i], True
                    gamma = group["scope"] * (1 + group["scope_growth"]) ** self.state[p].get("step", 0)
                    drift = decayed(g, p, group) - gamma * (start[i] - p)
                    velocities[i] = langevin(p, drift, velocities[i], group, together.noise)
                    means[i].lerp_(p, group["average"])
        if together.agreed(int(not vectors.is_finite(means))):
            raise StepFailedError("the chain left the finite numbers; lower inner_lr")
        return [x - mean if u else None for x, mean, u in zip(start, means, used, strict=True)]


class Together:
    """What processes that make the same step agree on: failures, and the noise of parameters that all of them have.

    They are known once the closure has run.
    """

    def __init__(self, params: Sequence[Tensor], buffers: BufferSnapshot) -> None:
        self.params, self.buffers = params, buffers

    @cached_property
    def processes(self) -> Processes | None:
        """Those that add up gradients; None for one."""
        return gradient_processes(self.params, self.buffers.process_group)

    def agreed(self, code: int) -> int:
        """The largest of everyone's codes."""
        return code if self.processes is None else int(max(row[0] for row in self.processes.table([code])))

    def noise(self, x: Tensor) -> Tensor:
        """N(0, I) like x, the same on all processes unless each has a part of x."""
        if self.processes is None:
            return torch.randn_like(x)
        in_parts = is_shard(x)
        local = as_dtensor(x).to_local() if in_parts else x
        source = self._generators[1 if in_parts and x.dim() else 0]
        noise = torch.randn(local.shape, generator=source, dtype=x.dtype).to(x.device)
        return laid(noise, as_dtensor(x).device_mesh, x.shape) if in_parts else noise

    @cached_property
    def _generators(self) -> tuple[torch.Generator, torch.Generator]:
        """Of all processes, seeded as rank 0 says, and of this one."""
        assert self.processes is not None  # as `noise` has seen to
        (seed,) = self.processes.numbers_of_first([float(torch.randint(2**52, ()))])
        own = int(seed) + 1 + self.processes.rank
        return torch.Generator().manual_seed(int(seed)), torch.Generator().manual_seed(own)


def langevin(
    x: Tensor,
    drift: Tensor,
    velocity: Tensor | None,
    group: dict[str, Any],
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor | None:
    """x' ← x' − η'·(drift with Nesterov momentum) + √η'·ε·N(0, I), in place; returns the new velocity."""
    d, velocity = nesterov(drift, velocity, group["momentum"])
    x.add_(d, alpha=-group["inner_lr"])
    if group["noise"]:
        x.add_(noise(x), alpha=math.sqrt(group["inner_lr"]) * group["noise"])
    return velocity


def nesterov(gradient: Tensor, velocity: Tensor | None, momentum: float) -> tuple[Tensor, Tensor | None]:
    """v ← βv + g and the direction g + βv, as `torch.optim.SGD` computes them; g itself for β = 0."""
    if not momentum:
        return gradient, None
    velocity = gradient.clone() if velocity is None else velocity.mul(momentum).add_(gradient)
    return gradient.add(velocity, alpha=momentum), velocity
