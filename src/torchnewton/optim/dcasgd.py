"""Asynchronous SGD with delay compensation: the update, a simulator of delays on one process, and a remote worker."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchnewton.optim.complete_state import CompleteState, as_before, completed, first_parameter, mark_initialized
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
from torchnewton.record import Closure
from torchnewton.vectors import Vector


class DCASGD(CompleteState):
    """DC-ASGD: w ← w − η(g + λ g⊙g⊙(w − w_bak)), g a worker's gradient at the parameters w_bak it last received.

    λ g⊙g⊙(w − w_bak) is a first-order correction of g for the steps that others have made meanwhile, with λ g gᵀ's
    diagonal in place of the Hessian. Adaptive form: MS ← μ·MS + (1 − μ)g⊙g for each worker, and λ/√(MS + 1e-7) in place
    of λ. λ = 0 is asynchronous SGD, and without delay it is `torch.optim.SGD`, both bit for bit.

    `step(closure)` simulates delays on one process: `delay` + 1 workers take turns, so that from the first round on a
    gradient is `delay` updates old. The closure sees w_bak; between steps the parameters are the server's w. On several
    processes a `tn.ParameterServer` owns this optimizer, and each worker has a `tn.DCASGDWorker`: the same update.

    Args:
        params: parameters or parameter groups; a group may set all but `delay`.
        lr: η.
        compensation: λ; 0.04, and 2 for the adaptive form.
        adaptive: the adaptive form.
        decay: μ.
        momentum: β of the server's velocity v ← βv + (compensated gradient); 0 is none.
        weight_decay: w, adds ½w‖θ‖² to the loss; its gradient is that at w, which the server knows.
        delay: of the simulator; 0.

    A gradient that is not finite, by itself or with its compensation, is dropped, state and parameters stay as they
    were, bit for bit, and `report.status` names the worker. What `torch.compile` has made runs as eager code.

    Errors: `ValueError` for arguments out of range, no closure, a closure without `backward()`, or a gradient of
    another shape. Cost: one gradient; memory of one vector for each worker, with `adaptive` two.
    Source: Zheng et al., "Asynchronous Stochastic Gradient Descent with Delay Compensation", arXiv 1609.08326; written
    from the formulas. Derived, not stated there: momentum and weight decay act after the compensation.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 0.1,
        compensation: float | None = None,
        adaptive: bool = False,
        decay: float = 0.95,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        delay: int = 0,
    ) -> None:
        compensation = (2.0 if adaptive else 0.04) if compensation is None else compensation
        check_ranges("DCASGD", delay=(delay, 0, math.inf))
        defaults = {
            "lr": lr,
            "compensation": compensation,
            "adaptive": adaptive,
            "decay": decay,
            "momentum": momentum,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.delay = delay
        self.report = StepReport()
        mark_initialized(self)

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; complete before the first step, too."""
        workers = [str(i) for i in range(self.delay + 1)]

        def blank(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = {"backups": {worker: p.clone() for worker in workers}}
            if group["adaptive"]:
                found["mean_squares"] = {worker: torch.zeros_like(p) for worker in workers}
            if group["momentum"]:
                found["momentum"] = torch.zeros_like(p)
            return found

        return completed(self, super().state_dict(), {"turn": 0}, blank)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`."""
        super().load_state_dict(as_before(state_dict, ["turn"]))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One worker's turn; returns the loss it saw at w_bak."""
        closure, params = needed(closure, self), [p for p, _ in trainable(self)]
        self.report = StepReport()
        calls = Calls(closure, params, self.report)
        memory = self.state[first_parameter(self)]
        turn = memory.setdefault("turn", 0)
        if turn == 0 or not self.delay:  # without delay nobody has parameters of an earlier time
            for i in range(self.delay + 1):
                self.send(str(i))
        for p in params:
            if "backups" not in self.state[p]:  # trained from now on
                self.state[p]["backups"] = {str(i): p.detach().clone() for i in range(self.delay + 1)}
        worker, kept = str(turn % (self.delay + 1)), [p.detach().clone() for p in params]
        try:
            with all_or_nothing(params):
                put(params, [self.state[p]["backups"].get(worker, p) for p in params])
                gradient = calls()
        except StepFailedError as failure:
            self.report.status = f"rejected: {failure} (worker {worker})"
            return calls.returned
        put(params, kept)
        reason = self.receive(worker, gradient)
        if reason:
            self.report.status = f"rejected: {reason} (worker {worker})"
            return calls.returned
        memory["turn"] = turn + 1
        self.send(worker)
        self.report.accepted, self.report.step_length = True, 1.0
        return calls.returned

    @torch.no_grad()
    def send(self, worker: str) -> list[Tensor]:
        """w for this worker, who will be known to have it; one tensor for each parameter that requires a gradient."""
        sent = []
        for p, _ in trainable(self):
            backups = self.state[p].setdefault("backups", {})
            backups[worker] = p.detach().clone()
            sent.append(backups[worker])
        return sent

    @torch.no_grad()
    def receive(self, worker: str, gradient: Sequence[Tensor | None]) -> str:
        """Move by a worker's gradient, None where a parameter was not used; why it was dropped, or nothing.

        Raises:
            ValueError: if the shapes are not those of the parameters.
        """
        pairs = trainable(self)
        shapes = [None if g is None else tuple(g.shape) for g in gradient]
        if len(shapes) != len(pairs) or any(s not in (None, p.shape) for s, (p, _) in zip(shapes, pairs, strict=True)):
            raise ValueError(
                f"gradient: worker {worker} sent the shapes {shapes}, the parameters have "
                f"{[tuple(p.shape) for p, _ in pairs]}; give server and workers the same model."
            )
        if not all(g is None or bool(torch.isfinite(g).all()) for g in gradient):
            return "the gradient is not finite"
        moves = [
            self._move(worker, g.to(p), p, group)
            for g, (p, group) in zip(gradient, pairs, strict=True)
            if g is not None
        ]
        if not all(bool(torch.isfinite(x).all()) for move in moves for x in move.tensors()):
            return "the compensated gradient is not finite"
        for move in moves:
            state = self.state[move.p]
            if move.mean_square is not None:
                if "mean_squares" not in state:
                    state["mean_squares"] = {known: torch.zeros_like(move.p) for known in state.get("backups", {})}
                state["mean_squares"][worker] = move.mean_square
            if move.velocity is not None:
                state["momentum"] = move.velocity
            move.p.copy_(move.new)
        return ""

    def _move(self, worker: str, g: Tensor, p: Tensor, group: dict[str, Any]) -> Move:
        """What a gradient makes of a parameter and its state, which stay as they are."""
        state = self.state[p]
        backup = state.get("backups", {}).get(worker, p)
        squares = state.get("mean_squares", {}) if group["adaptive"] else {}
        d, mean_square = compensated(g, p - backup, squares.get(worker), group)
        d, velocity = decayed(d, p, group), None
        if group["momentum"]:
            old = state.get("momentum")
            d = velocity = d.clone() if old is None else old.mul(group["momentum"]).add_(d)
        return Move(p, p.add(d, alpha=-group["lr"]), mean_square, velocity)


@dataclass(frozen=True)
class Move:
    """A parameter, its new value, the new MS of the worker, and the new velocity."""

    p: Tensor
    new: Tensor
    mean_square: Tensor | None
    velocity: Tensor | None

    def tensors(self) -> list[Tensor]:
        """What is new."""
        return [x for x in (self.new, self.mean_square, self.velocity) if x is not None]


def compensated(
    g: Tensor, moved: Tensor, mean_square: Tensor | None, group: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """g + λ g⊙g⊙(w − w_bak), `moved` = w − w_bak, and the new MS of the adaptive form."""
    strength = group["compensation"]
    if group["adaptive"]:
        old = torch.zeros_like(g) if mean_square is None else mean_square
        mean_square = old * group["decay"] + (1 - group["decay"]) * g * g
        strength = strength / (mean_square + 1e-7).sqrt()
    if not group["compensation"]:
        return g, mean_square
    return g + strength * (g * (g * moved)), mean_square


class Connection(Protocol):
    """The way to a server, as `tn.ServerConnection`."""

    def pull(self) -> list[Tensor]:
        """The server's parameters."""
        ...

    def push(self, gradient: Sequence[Tensor | None], failure: str = "") -> tuple[list[Tensor], str]:
        """Send a gradient, or why there is none; the new parameters, and why the gradient was dropped."""
        ...


class DCASGDWorker(Optimizer):
    """A worker of asynchronous SGD: `step(closure)` sends the gradient to the server and takes its new parameters.

        with tn.ServerConnection("tcp://localhost:29500", "worker-3") as server:
            optimizer = tn.DCASGDWorker(model.parameters(), server)

    The parameters are pulled at once. All settings are the server's; the model has to be the same. A loss or gradient
    that is not finite is reported to the server and dropped; `report.status` says so, and training goes on from the
    server's parameters.

    Errors: `ConnectionError` where the server does not answer; `ValueError` for no closure, a closure without
    `backward()`, or a model of other shapes.
    """

    def __init__(self, params: Iterable[Any], server: Connection) -> None:
        super().__init__(params, {})
        self.server = server
        self.report = StepReport()
        put(self._params(), self._fitting(server.pull()))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One gradient for the server; returns its loss."""
        closure, params = needed(closure, self), self._params()
        self.report = StepReport()
        calls = Calls(closure, params, self.report)
        try:
            with all_or_nothing(params):
                gradient, failure = calls(), ""
        except StepFailedError as found:
            gradient, failure = [], str(found)
        new, failure = self.server.push(gradient, failure)
        put(params, self._fitting(new))
        self.report.accepted, self.report.step_length = not failure, float(not failure)
        self.report.status = f"rejected: {failure}" if failure else ""
        return calls.returned

    def _params(self) -> Vector:
        return [p for p, _ in trainable(self)]

    def _fitting(self, received: list[Tensor]) -> list[Tensor]:
        shapes = [tuple(p.shape) for p in self._params()]
        if [tuple(t.shape) for t in received] != shapes:
            raise ValueError(
                f"params: the server's have the shapes {[tuple(t.shape) for t in received]}, these {shapes}; give both "
                "the same model."
            )
        return received
