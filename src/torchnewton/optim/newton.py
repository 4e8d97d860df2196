"""The one step loop: record → solve → search → accept or reject → adapt the damping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import KFAC, Diagonal, GaussNewton, LinearOperator
from torchnewton.distributed import DataParallel, average_share, record_share, whole_parameters
from torchnewton.globalization import Armijo, AutoDamping, Damping, LearnsFromNewData, LineSearch, TrustRegion, Unit
from torchnewton.optim.acceleration import GeodesicAcceleration
from torchnewton.optim.complete_state import mark_initialized
from torchnewton.optim.escape import SaddleEscape
from torchnewton.optim.flagship import MOST_SOLVES_AGAIN, Flagship
from torchnewton.optim.memory import Curvature, Preconditioner, as_memory
from torchnewton.optim.point import Point
from torchnewton.optim.regime import RegimeChoice, RegimeState
from torchnewton.optim.report import StepReport
from torchnewton.record import (
    UNDEFINED,
    BufferSnapshot,
    Closure,
    Objective,
    RecordError,
    StreamedTape,
    Tape,
    same_random_numbers,
    warn_about_rest,
)
from torchnewton.solvers import Auto, Operator, Solver, SolveResult, Status, UsesPreviousStep
from torchnewton.vectors import Vector


class Newton(Flagship):
    """Newton-type training: (A + λI)d = −g, θ ← θ + αd, nothing to tune.

    A is the curvature of f at θ (default: the Gauss-Newton matrix), g its gradient, λ the damping, α a step length.
    f is the loss as the closure returns it; `weight_decay` w, which may differ between parameter groups, adds ½w‖θ‖²
    to objective, gradient and curvature.

        loss = optimizer.step(closure)                    # the loss before the step
        loss = optimizer.step(closure, curvature=other)   # curvature from another, usually smaller batch
        optimizer.report                                  # what the step did

    The closure may call `zero_grad()` and `backward()` as for `torch.optim.LBFGS`; it need not. It is run again
    within a step at trial points, on the same random numbers and with BatchNorm statistics held.

    Where none of curvature, solver, damping, preconditioner and trust_region is given, they come in two sets, and
    `report.regime` says which has made the step. "exact": a factorization of G + λI, Levenberg-Marquardt, while that is
    cheap and the steps help on the batches that follow, too, or at least lower their losses in the long run. "plane"
    otherwise: Kronecker factors of earlier batches, `KFAC`, turn the gradient; the exact model of this batch is
    minimized over that direction and the last step, `Plane`; λ in units of the gradient's noise. See `RegimeChoice`.

    Args:
        params: parameters or parameter groups, as for every torch optimizer.
        curvature: makes A from a tape; `GaussNewton`, also where only others of these five are given.
        solver: solves for d; likewise `Auto()`, which chooses between a factorization in the space of the parameters or
            of the outputs and CG.
        damping: the rule for λ; likewise `AutoDamping()`.
        line_search: chooses α; `Armijo()`.
        trust_region: chooses α within a radius that the optimizer remembers, instead of `line_search`; none.
        momentum: β of a running average of the gradients that takes the place of g.
        preconditioner: approximates (A + λI)⁻¹ for an iterative solver and remembers earlier steps, as `KFAC()`.
        acceleration: a second-order correction of d, made where a factorization exists to be used again; the two
            sets have their own.
        escape: the way out of a saddle, for a curvature that may be negative, with a `trust_region`; none.
        retries: how often a step that the line search refused is solved again in the same step with λ raised. The
            first of the two sets does so on its own, instead of shortening, on the data of the last step and where it
            trusts its batch.
        weight_decay: w, see above; the only option a parameter group may set.
        process_group: the processes over which the samples are spread, or a `DataParallel` that says more; f is then
            the mean over the samples of all, and every process makes the same step. A closure whose model is under
            `DistributedDataParallel` needs no such argument.

    A step whose loss, gradient, product or direction is not finite is rejected: parameters and buffers stay as they
    were, bit for bit, λ is raised, and `report.status` says why.

    Errors: `RecordError` for a closure that cannot be recorded, or whose loss changes between two runs on the same
    random numbers (checked once, at the first step); `ValueError` for arguments.
    Cost of a step: one gradient, the solve (`report.products` products of 4/3 gradients, or a factorization), and 1/3
    of a gradient for each loss evaluation. Memory: the graph of the loss and that of its backward pass, about five
    vectors like the parameters, and for a factorization the rows of the Jacobian and the factorized matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        curvature: Curvature | None = None,
        solver: Solver | None = None,
        damping: Damping | None = None,
        line_search: LineSearch | None = None,
        trust_region: TrustRegion | None = None,
        momentum: float = 0.0,
        preconditioner: Preconditioner | None = None,
        acceleration: GeodesicAcceleration | None = GeodesicAcceleration(),
        escape: SaddleEscape | None = None,
        retries: int = 0,
        weight_decay: float = 0.0,
        process_group: DataParallel | dist.ProcessGroup | None = None,
    ) -> None:
        name = type(self).__name__
        if not weight_decay >= 0:
            raise ValueError(f"{name}: weight_decay={weight_decay} must not be negative.")
        if not 0 <= momentum < 1:
            raise ValueError(f"{name}: momentum={momentum} must be at least 0 and less than 1.")
        if retries < 0:
            raise ValueError(f"{name}: retries={retries} must not be negative.")
        if escape is not None and trust_region is None:
            raise ValueError(f"{name}: escape={escape} goes as far as a radius allows: give a trust_region, too.")
        super().__init__(params, {"weight_decay": weight_decay})
        free = curvature is None and solver is None and damping is None and preconditioner is None
        self.choice = RegimeChoice() if free and trust_region is None else None
        self.curvature: Curvature = GaussNewton if curvature is None else curvature
        self.solver: Solver = Auto() if solver is None else solver
        self.damping: Damping = AutoDamping() if damping is None else damping
        self.line_search: LineSearch = Armijo() if line_search is None else line_search
        self.trust_region = trust_region
        self.escape = escape
        self.momentum = momentum
        self.preconditioner = preconditioner
        self._running: Preconditioner | None = preconditioner if self.choice is None else KFAC()
        self._untaught = {} if self._running is None else self._running.state_dict()
        self.acceleration = acceleration
        self.retries = retries
        self._buffers: BufferSnapshot | None = None
        self.data_parallel = DataParallel.of(process_group)
        self.report = StepReport()
        mark_initialized(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_buffers": None}  # which would bring the modules along

    @property
    def radius(self) -> float:
        """The trust radius of the next step; infinite without `trust_region`."""
        return math.inf if self.trust_region is None else float(self._memory["radius"])

    def solver_at(self, num_steps: int) -> Solver:
        """The solver of a step after `num_steps` others; a named method may change it on the way."""
        return self.solver

    def inverse_at(self, gradient: Vector, damping: float) -> Operator | None:
        """The approximation of (A + λI)⁻¹ for an iterative solver; a named method may have one of its own."""
        return None if self.preconditioner is None else self.preconditioner.inverse(damping)

    @torch.no_grad()
    def step(self, closure: Closure | None = None, curvature: Closure | None = None) -> Any:
        """Make one step and return the loss before it; see the class."""
        if closure is None:
            raise ValueError(
                f"{type(self).__name__}.step needs a closure that returns the loss: optimizer.step(closure), as for "
                "torch.optim.LBFGS."
            )
        pairs = [(p, group["weight_decay"]) for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not pairs:
            raise ValueError(f"{type(self).__name__}.step: no parameter of the optimizer requires a gradient.")
        with whole_parameters([p for p, _ in pairs], self.data_parallel):
            return self._step(closure, curvature, pairs)

    def _step(self, closure: Closure, curvature: Closure | None, pairs: list[tuple[Tensor, float]]) -> Any:
        self.report = StepReport(damping=self._memory["damping"] * (self._memory["scale"] or 1.0))
        if self.trust_region is not None:
            self.report.radius = self.radius
        params, decays = [p for p, _ in pairs], [w for _, w in pairs]
        self._notice(params)
        if curvature is None and self.data_parallel is None:
            glided = self._glided(closure, params, decays)
            if glided is not None:
                return glided[0]
        with self._timed("record"):
            create_graph = self._memory["products"] and curvature is None
            try:
                point = Point(closure, params, decays, create_graph=create_graph, parallel=self.data_parallel)
            except UNDEFINED:
                if not self._has_left_domain(params):
                    raise
                point = Point(closure, params, decays, create_graph=create_graph, parallel=self.data_parallel)
        self.data_parallel = point.share.parallel
        saved = {p: dict(self.state[p]) for group in self.param_groups for p in group["params"] if p in self.state}
        running = None if self._running is None else self._running.state_dict()
        try:
            with point.share.agreeing():
                self._check_repeatable(point)
                failure = self._advance(point, curvature)
        except BaseException as error:
            can_go_on = isinstance(error, RecordError) and self._has_other_regime(point)
            self._undo(point, saved, running)
            if not can_go_on:
                raise
            return self._without_exact_steps(point, error)
        finally:
            self.report.bytes_communicated, self.report.messages = point.share.spent()
        if failure:
            chosen = {name: self._memory[name] for name in ("regime", "damping", "scale")}
            self._undo(point, saved, running)
            if self.choice is not None and self._memory["regime"]["exact"] is None:
                self._memory.update(chosen)  # the parts of the first step: λ is raised from theirs
                self._use_regime()
            self._reject(failure)
        else:
            point.settle()
        return point.returned

    def _advance(self, point: Point, curvature: Closure | None) -> str:
        """Solve and search; returns why the step must be rejected, or nothing."""
        report, memory = self.report, self._memory
        report.loss, report.gradient_norm = point.loss, vectors.norm(point.gradient)
        if self._take_back(point):
            return ""
        if not math.isfinite(point.value):
            return "the loss is not finite"
        if not math.isfinite(report.gradient_norm):
            return "the gradient is not finite"
        if report.gradient_norm == 0 and self.escape is None:
            report.status = "the gradient is zero: this is a stationary point"
            return ""
        glider = self._glider(point.params)
        if glider is not None and self._running is not None:
            report.gradient_equivalents += self._running.update(point.recorded, point.share.statistics)
            done = self._glide(glider, point.params, point.gradient, point.value, point.share)
            return "" if done else Status.NOT_FINITE.value
        average, gradient = self._averaged(point)
        with self._timed("search"):
            same_data = self._judge_last_step(point)
        to_take_back = self._choose_regime(point, same_data)
        if to_take_back and self._value_at_anchor(point) < point.value:
            self._return_to_anchor(point.params, to_take_back)
            return ""
        with self._timed("record"):
            A = self._operator(point, curvature)
            self._find_scale(point, A, gradient)
        solver, result = self.solver_at(memory["step"]), None
        for number in range(1 + max(self.retries, MOST_SOLVES_AGAIN)):
            with self._timed("solve"):
                result = self._solve(point, solver, A, gradient, result)
            if result.status is Status.NOT_FINITE or not vectors.is_finite(result.solution):
                return Status.NOT_FINITE.value
            if report.gradient_norm == 0 and vectors.norm(result.solution) == 0:
                report.status = "the gradient is zero: this is a stationary point"
                break
            again = number < MOST_SOLVES_AGAIN and self._solves_again(result, same_data)
            with self._timed("search"):
                self._search(point, gradient, result, Armijo(max_halvings=0) if again else self.line_search)
            if report.accepted or not (again or number < self.retries):
                break
        report.gradient_equivalents += 1 + report.loss_evaluations / 3
        report.gradient_equivalents += _fraction_seen(point, curvature) * report.products * A.gradients_per_product
        memory["step"] += 1
        memory["work"] += memory["regime"]["price"] if memory["regime"]["exact"] else 1.0
        assert result is not None  # `retries` is not negative
        self._prepare_glide(point, result)
        if self.momentum:
            for p, m in zip(point.params, average, strict=True):
                self.state[p]["momentum"] = m
        return ""

    def _find_scale(self, point: Point, A: LinearOperator, gradient: Vector) -> None:
        """The unit of λ: of the curvature at the first step, of the noise as a running average."""
        memory, unit = self._memory, self.damping.unit
        if unit is Unit.ABSOLUTE:
            memory["scale"] = 1.0
        elif unit is Unit.CURVATURE and memory["scale"] is None and self.report.gradient_norm > 0:
            curvature = vectors.dot(gradient, A @ gradient) / vectors.dot(gradient, gradient)
            memory["scale"] = curvature if math.isfinite(curvature) and curvature > 0 else 1.0
            self.report.products += 1
        elif unit is Unit.NOISE and (memory["scale"] is None or memory["step"] < 10 or memory["step"] % 10 == 0):
            noise = point.share.noise_scale(point.recorded, torch.Generator().manual_seed(memory["step"]))
            old = memory["scale"]
            if not (math.isfinite(noise) and noise > 0):
                noise = old or 1.0
            memory["scale"] = noise if old is None else 0.7 * old + 0.3 * noise

    def _judge_last_step(self, point: Point) -> bool:
        """Whether the data are those of the last step; if not, some rules ask what that step has done for the new."""
        memory, last = self._memory, self._memory["last"]
        memory["last"] = None
        directions = self._previous_step(point.params)
        if last is None or directions is None:
            return False
        damping, ratio, step_length, predicted, value = last
        if abs(point.value - value) <= 1e-6 * abs(value):
            return True
        if isinstance(self.damping, LearnsFromNewData) and not self._is_bold:
            before = point.evaluate(directions, -1.0)
            self.report.loss_evaluations += 1
            new_ratio = _ratio(before - point.value, predicted)
            memory["damping"] = self.damping.update_on_new_data(damping, ratio, step_length, new_ratio)
            if self.choice is not None:
                memory["regime"] = as_memory(self.choice.judged(RegimeState(**memory["regime"]), new_ratio))
        return False

    def _averaged(self, point: Point) -> tuple[Vector, Vector]:
        """The running average m of gradients, and m / (1 − βᵗ)."""
        if not self.momentum:
            return [], point.gradient
        beta, t = self.momentum, self._memory["step"] + 1
        old = [self.state[p].get("momentum", torch.zeros_like(p)) for p in point.params]
        average = vectors.add(vectors.scale(old, beta), point.gradient, 1 - beta)
        return average, vectors.scale(average, 1 / (1 - beta**t))

    def _operator(self, point: Point, curvature: Closure | None) -> LinearOperator:
        """The curvature of the objective, from the step's own tape or from another closure's."""
        A: LinearOperator
        tape: Tape | StreamedTape
        objective = point.closure if curvature is None else curvature
        if isinstance(objective, Objective) and objective.is_streamed:
            same = point.tape.random_state if curvature is None else None
            with same_random_numbers(same, [p.device for p in point.params]):
                A, tape = average_share(objective, point.params, self.curvature, self.data_parallel)
        else:
            if curvature is None:
                tape, share = point.recorded, point.share
            else:
                tape, share = record_share(curvature, point.params, self.data_parallel, for_curvature=True)
                point.settled_by(tape)
            assert isinstance(tape, Tape)  # for mypy: streamed is above
            A = share.operator(self.curvature(tape))
        if tape.has_rest and not A.covers_whole_loss and not self._memory["warned"]:
            self._memory["warned"] = True
            warn_about_rest()
        if len(set(point.weight_decay)) == 1:
            return A + point.weight_decay[0] if point.weight_decay[0] else A
        if any(point.weight_decay):
            A = A + Diagonal([torch.full_like(p, w) for p, w in zip(point.params, point.weight_decay, strict=True)])
        return A

    def _solve(
        self, point: Point, solver: Solver, A: LinearOperator, gradient: Vector, refused: SolveResult | None
    ) -> SolveResult:
        """The direction; a factorization that meets a matrix which rounding has made indefinite raises λ.

        What has been factorized for a direction of this step that was `refused` serves the next λ, too.
        """
        report, memory = self.report, self._memory
        alone = point.share.parallel is None
        rhs = point.tape.descent if alone and gradient is point.tape.gradient else vectors.scale(gradient, -1.0)
        start = self._previous_step(point.params) if isinstance(solver, UsesPreviousStep) else None
        if self.preconditioner is not None:
            report.gradient_equivalents += self.preconditioner.update(point.recorded, point.share.statistics)
        refused_at = report.damping
        while True:
            damping = report.damping = memory["damping"] * memory["scale"]
            if refused is not None and refused.shifted is not None:
                result = refused.shifted(damping - refused_at)
            else:
                M = point.share.preconditioner(self.inverse_at(gradient, damping))
                result = solver.solve(A + damping, rhs, start, M)
            result = point.share.agreed(result, rhs)
            raised = self.damping.raised(memory["damping"])
            if result.status is not Status.NOT_POSITIVE_DEFINITE or raised <= memory["damping"]:
                break
            memory["damping"] = raised
        if self.escape is not None and result.status is not Status.NOT_FINITE:
            better = self.escape.better(result, A + damping, gradient, point.value, self.radius, memory["step"])
            result = result if better is result else point.share.agreed(better, rhs)
        report.solver, report.jacobian = result.method, A.path if result.num_products else ""
        report.status = result.status.value
        report.inner_iterations += result.num_iterations
        report.products += result.num_products
        report.loss_evaluations += result.num_evaluations
        report.gradient_equivalents += result.flops / max(3 * point.tape.forward_flops, 1.0)
        memory["products"] = result.num_products > 0 and "kept" in report.jacobian
        chosen = self._best_iterate(point, self._best_damping(point, result))
        return chosen if chosen is result else point.share.agreed(chosen, rhs)

    def _value_of(self, point: Point, result: SolveResult) -> float:
        """The objective after the full step, infinite where it is not finite."""
        self.report.loss_evaluations += 1
        value = point.evaluate(result.solution, 1.0)
        return value if math.isfinite(value) else math.inf

    def _best_iterate(self, point: Point, result: SolveResult) -> SolveResult:
        """For a solver that keeps its iterates: back to earlier ones as long as the objective falls."""
        if not result.iterates or result.status is Status.NOT_FINITE:
            return result
        best, lowest = result, self._value_of(point, result)
        for x, curvature in reversed(result.iterates):
            earlier = replace(result, solution=x, residual=None, residual_norm=math.nan, curvature=curvature)
            value = self._value_of(point, earlier)
            if lowest < math.inf and not value < lowest:
                break
            best, lowest = earlier, value
        return best

    def _best_damping(self, point: Point, result: SolveResult) -> SolveResult:
        """For a rule that searches: the λ among several whose full step reaches the lowest objective."""
        report, memory = self.report, self._memory
        if not self.damping.search or result.shifted is None or result.status is Status.NOT_FINITE:
            return result
        damping, best, lowest = memory["damping"], result, self._value_of(point, result)
        for factor in self.damping.search:
            other = result.shifted(report.damping * (factor - 1))
            report.gradient_equivalents += other.flops / max(3 * point.tape.forward_flops, 1.0)
            if (
                other.status in (Status.CONVERGED, Status.MAX_ITERATIONS)
                and (value := self._value_of(point, other)) < lowest
            ):
                best, lowest, memory["damping"] = other, value, damping * factor
        report.damping = memory["damping"] * memory["scale"]
        return best

    def _search(self, point: Point, gradient: Vector, result: SolveResult, line_search: LineSearch) -> None:
        """Judge the direction, choose a step length, move if it is accepted, adapt λ."""
        report, rule, memory, d = self.report, self.damping, self._memory, result.solution
        slope = vectors.dot(gradient, d) if result.slope is None else result.slope
        curved = result.curved(slope)
        if not (slope < 0 or (slope == 0 and curved < 0)):
            report.status = f"no descent direction was found: {result.status.value}"
            memory["damping"] = rule.raised(memory["damping"])
            return
        if not rule.damped_model:
            curved -= report.damping * vectors.dot(d, d)
        if self.acceleration is not None and result.reuse is not None and isinstance(point.tape, Tape):
            d = self.acceleration.corrected(point, d, result.reuse)
            report.loss_evaluations += 2

        def evaluate(step_length: float) -> float:
            report.loss_evaluations += 1
            return point.evaluate(d, step_length)

        if self.trust_region is None:
            full = evaluate(1.0)
            found = line_search.search(evaluate, point.value, slope, full)
            alpha, value = (1.0, full) if rule.full_step else (found.step_length, found.value)
        else:
            rounding = 10 * torch.finfo(d[0].dtype).eps * abs(point.value)
            found, memory["radius"] = self.trust_region.search(
                evaluate, point.value, slope, curved, vectors.norm(d), self.radius, rounding
            )
            alpha, value = found.step_length, found.value
        report.predicted_reduction = -(alpha * slope + 0.5 * alpha**2 * curved)
        report.actual_reduction = point.value - value
        report.reduction_ratio = _ratio(report.actual_reduction, report.predicted_reduction)
        if not found.accepted:
            report.status = "no step length gave a sufficient decrease"
            memory["damping"] = rule.raised(memory["damping"])
            return
        self._move(point.params, d, found.step_length)
        if isinstance(rule, LearnsFromNewData) or self.choice is not None:
            ratio, predicted = report.reduction_ratio, report.predicted_reduction
            memory["last"] = (memory["damping"], ratio, alpha, predicted, found.value)
        memory["damping"] = rule.update(memory["damping"], report.reduction_ratio, alpha, memory["step"] + 1)

    def _undo(self, point: Point, saved: dict[Tensor, dict[str, Any]], running: dict[str, Any] | None) -> None:
        """Buffers and state as before the step; the parameters have not moved."""
        point.undo()
        if self._running is not None and running is not None:
            self._running.load_state_dict(running)
        for p, state in saved.items():
            self.state[p] = state
        self._use_regime()

    def _reject(self, reason: str) -> None:
        self.report.status = f"rejected: {reason}"
        self.report.accepted = False
        self._memory["last"] = None
        self._memory["damping"] = self.damping.raised(self._memory["damping"])
        if self.trust_region is not None:
            self._memory["radius"] = self.trust_region.shrunk(self.radius)

    def _check_repeatable(self, point: Point) -> None:
        """At the first step: the closure must give the same loss again."""
        if self._memory["checked"] or not math.isfinite(point.loss):
            return
        point.share.check_same(point.params)
        again = point.replayed()
        tolerance = torch.finfo(point.params[0].dtype).eps ** 0.5 * max(abs(point.loss), 1e-8)
        if not abs(again - point.loss) <= tolerance:
            raise RecordError(
                f"the closure gave {point.loss:.8g} and then {again:.8g} at the same parameters and the same random "
                "numbers: a Newton step evaluates it several times, so draw the batch before step() and keep it fixed "
                "inside the closure."
            )
        self._memory["checked"] = True


def _fraction_seen(point: Point, curvature: Closure | None) -> float:
    """How many of the samples of the loss the curvature sees, where both are objectives that have been counted."""
    if not (isinstance(point.closure, Objective) and isinstance(curvature, Objective)):
        return 1.0
    return (curvature.total_weight or 1.0) / (point.closure.total_weight or 1.0)


def _ratio(actual: float, predicted: float) -> float:
    """actual / predicted, NaN where no reduction was predicted."""
    return actual / predicted if predicted > 0 else math.nan
