"""The one step loop: record → solve → search → accept or reject → adapt the damping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchnewton import vectors
from torchnewton.curvature import KFAC, GaussNewton, LinearOperator
from torchnewton.distributed import DataParallel, whole_parameters
from torchnewton.globalization import (
    Armijo,
    AutoDamping,
    ConstantDamping,
    Damping,
    LearnsFromNewData,
    LineSearch,
    TrustRegion,
)
from torchnewton.optim.acceleration import GeodesicAcceleration
from torchnewton.optim.arguments import as_rule, check_curvature, check_parts
from torchnewton.optim.complete_state import mark_initialized
from torchnewton.optim.escape import SaddleEscape
from torchnewton.optim.evaluation import check_ranges
from torchnewton.optim.flagship import MOST_SOLVES_AGAIN, Flagship
from torchnewton.optim.memory import RunningPreconditioner, as_memory
from torchnewton.optim.point import Curvature, Point
from torchnewton.optim.regime import RegimeChoice, RegimeState
from torchnewton.optim.report import StepReport
from torchnewton.record import (
    UNDEFINED,
    BufferSnapshot,
    Closure,
    Objective,
    RecordError,
    Tape,
    refuse_complex,
    warn_about_rest,
)
from torchnewton.solvers import Auto, Operator, Solver, SolveResult, Status, uses_previous_step
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
        damping: the rule for λ, or a number for a constant one; likewise `AutoDamping()`. (For a named method, which
            has a rule of its own, a number is the first λ.)
        line_search: chooses α; `Armijo()`. Any other chooses it in every step, so that none glides.
        trust_region: chooses α within a radius that the optimizer remembers, instead of `line_search`; none.
        momentum: β of a running average of the gradients that takes the place of g.
        preconditioner: approximates (A + λI)⁻¹ for an iterative solver and remembers earlier steps, as `KFAC()`.
        acceleration: a second-order correction of d, made where a factorization exists to be used again, so never in
            "plane"; None for none.
        escape: the way out of a saddle, for a curvature that may be negative, with a `trust_region`; none.
        weight_decay: w, see above; the only option a parameter group may set.
        process_group: the processes over which the samples are spread, or a `DataParallel` that says more; f is then
            the mean over the samples of all, and every process makes the same step. A closure whose model is under
            `DistributedDataParallel` needs no such argument.

    A step whose loss, gradient, product or direction is not finite is rejected: parameters and buffers stay as they
    were, bit for bit, λ is raised, and `report.status` says why.

    Errors: `RecordError` for a closure that cannot be recorded, or whose loss changes between two runs on the same
    random numbers (checked once, at the first step); `ValueError` for arguments.
    Cost of a step: one gradient, the solve (`report.products` products of 4/3 gradients, or a factorization), and 1/3
    of a gradient for each loss evaluation. Memory: the graph of the loss and that of its backward pass, about six
    vectors like the parameters, and for a factorization the rows of the Jacobian and the factorized matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        curvature: Curvature | None = None,
        solver: Solver | None = None,
        damping: float | Damping | None = None,
        line_search: LineSearch | None = None,
        trust_region: TrustRegion | None = None,
        momentum: float = 0.0,
        preconditioner: RunningPreconditioner | None = None,
        acceleration: GeodesicAcceleration | None = GeodesicAcceleration(),
        escape: SaddleEscape | None = None,
        weight_decay: float = 0.0,
        process_group: DataParallel | dist.ProcessGroup | None = None,
    ) -> None:
        name = type(self).__name__
        check_ranges(name, momentum=(momentum, 0, 1))
        check_curvature(name, GaussNewton if curvature is None else curvature)
        damping = None if damping is None else as_rule(damping, ConstantDamping)
        check_parts(name, solver=solver, damping=damping, preconditioner=preconditioner, acceleration=acceleration)
        check_parts(name, line_search=line_search, trust_region=trust_region, escape=escape)
        if line_search is not None and trust_region is not None:
            raise ValueError(
                f"{name}: line_search={line_search} chooses no length beside a trust_region: leave one out."
            )
        if escape is not None and trust_region is None:
            raise ValueError(f"{name}: escape={escape} goes as far as a radius allows: give a trust_region, too.")
        super().__init__(params, {"weight_decay": weight_decay})
        free = curvature is None and solver is None and damping is None and preconditioner is None
        self.choice = RegimeChoice() if free and trust_region is None else None
        self.curvature: Curvature = GaussNewton if curvature is None else curvature
        self.solver: Solver = Auto() if solver is None else solver
        self.damping: Damping = AutoDamping() if damping is None else damping
        self.line_search: LineSearch = Armijo() if line_search is None else line_search
        self._is_given_search = self.line_search != Armijo()  # the default, said aloud, changes nothing
        self.trust_region = trust_region
        self.escape = escape
        self.momentum = momentum
        self.preconditioner = preconditioner
        self._running: RunningPreconditioner | None = preconditioner if self.choice is None else KFAC()
        self._untaught = {} if self._running is None else self._running.state_dict()
        self.acceleration = self._correction = acceleration
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
        refuse_complex(p for p, _ in pairs)
        with whole_parameters([p for p, _ in pairs], self.data_parallel):
            return self._step(closure, curvature, pairs)

    def _step(self, closure: Closure, curvature: Closure | None, pairs: list[tuple[Tensor, float]]) -> Any:
        self.report = StepReport(damping=self._memory["damping"] * (self._memory["scale"] or 1.0))
        if self.trust_region is not None:
            self.report.radius = self.radius
        params, decays = [p for p, _ in pairs], [w for _, w in pairs]
        trained = self._places(params)
        if curvature is None and self.data_parallel is None and self._memory["trained"] == trained:
            glided = self._glided(closure, params, decays)
            if glided is not None:
                return glided[0]
        with self._timed("record"):
            point, undo = self._recorded(closure, params, decays, trained, curvature is None)
        self.data_parallel = point.share.parallel
        try:
            with point.share.agreeing():
                if not self._memory["checked"] and math.isfinite(point.loss):
                    point.require_repeatable()
                    self._memory["checked"] = True
                failure = self._advance(point, curvature)
        except BaseException as error:
            can_go_on = isinstance(error, RecordError) and self._has_other_regime(point)
            undo()
            point.undo()
            if not can_go_on:
                raise
            return self._without_exact_steps(point, error)
        finally:
            self.report.gradient_equivalents += self.report.loss_evaluations / 3
            self.report.bytes_communicated, self.report.messages = point.share.spent()
        if failure:
            chosen = {name: self._memory[name] for name in ("regime", "damping", "scale")}
            undo()
            point.undo()
            if self.choice is not None and self._memory["regime"]["exact"] is None:
                self._memory.update(chosen)  # the parts of the first step: λ is raised from theirs
                self._use_regime()
            self._reject(failure)
        else:
            point.settle()
        return point.returned

    def _recorded(
        self, closure: Closure, params: list[Tensor], decays: list[float], trained: tuple[int, ...], alone: bool
    ) -> tuple[Point, Callable[[], None]]:
        """The point of the step, and what undoes the step; an exception leaves all as it was.

        Where untested steps have led out of the closure's domain, the step starts where these began.
        """
        undo = self._undoing(params)
        try:
            self._notice(trained)
            create_graph = self._memory["products"] and alone
            point = partial(Point, closure, params, decays, create_graph=create_graph, parallel=self.data_parallel)
            try:
                return point(), undo
            except UNDEFINED:
                if not self._has_left_domain(params):
                    raise
                return point(), self._undoing(params)
        except BaseException:
            undo()
            raise

    def _advance(self, point: Point, curvature: Closure | None) -> str:
        """Solve and search; returns why the step must be rejected, or nothing."""
        report, memory = self.report, self._memory
        report.loss, report.gradient_norm = point.loss, vectors.norm(point.gradient)
        report.gradient_equivalents += 1
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
            A, tape = point.model(self.curvature, curvature)
            if tape.lacks_curvature and not A.covers_whole_loss and not memory["warned"]:
                memory["warned"] = True
                warn_about_rest()
            self._find_scale(point, A, gradient)
        solver, result, counted = self.solver_at(memory["step"]), None, 0.0
        for number in range(1 + MOST_SOLVES_AGAIN):
            with self._timed("solve"):
                result = self._solve(point, solver, A, gradient, result)
            if report.products > counted:  # now: what a product takes may have to be found where A was made
                made, counted = report.products - counted, report.products
                report.gradient_equivalents += _fraction_seen(point, curvature) * made * A.gradients_per_product
            if result.status is Status.NOT_FINITE or not vectors.is_finite(result.solution):
                return Status.NOT_FINITE.value
            if report.gradient_norm == 0 and vectors.norm(result.solution) == 0:
                report.status = "the gradient is zero: this is a stationary point"
                break
            again = number < MOST_SOLVES_AGAIN and self._solves_again(result, same_data)
            with self._timed("search"):
                self._search(point, gradient, result, Armijo(max_halvings=0) if again else self.line_search)
            if report.accepted or not again:
                break
        memory["step"] += 1
        memory["work"] += memory["regime"]["price"] if memory["regime"]["exact"] else 1.0
        assert result is not None  # the loop runs at least once
        self._prepare_glide(point, result)
        if self.momentum:
            for p, m in zip(point.params, average, strict=True):
                self.state[p]["momentum"] = m
        return ""

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

    def _solve(
        self, point: Point, solver: Solver, A: LinearOperator, gradient: Vector, refused: SolveResult | None
    ) -> SolveResult:
        """The direction; a factorization that meets a matrix which rounding has made indefinite raises λ.

        What has been factorized for a direction of this step that was `refused` serves the next λ, too.
        """
        report, memory = self.report, self._memory
        alone = point.share.parallel is None
        rhs = point.tape.descent if alone and gradient is point.tape.gradient else vectors.scale(gradient, -1.0)
        start = self._previous_step(point.params) if uses_previous_step(solver) else None
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

    def _best_iterate(self, point: Point, result: SolveResult) -> SolveResult:
        """For a solver that keeps its iterates: back to earlier ones as long as the objective falls."""
        if not result.iterates or result.status is Status.NOT_FINITE:
            return result
        self.report.loss_evaluations += 1
        best, lowest = result, point.full_step(result.solution)
        for x, curvature in reversed(result.iterates):
            earlier = replace(result, solution=x, residual=None, residual_norm=math.nan, curvature=curvature)
            value = point.full_step(x)
            self.report.loss_evaluations += 1
            if lowest < math.inf and not value < lowest:
                break
            best, lowest = earlier, value
        return best

    def _best_damping(self, point: Point, result: SolveResult) -> SolveResult:
        """For a rule that searches: the λ among several whose full step reaches the lowest objective."""
        report, memory = self.report, self._memory
        if not self.damping.search or result.shifted is None or result.status is Status.NOT_FINITE:
            return result
        damping, best, lowest = memory["damping"], result, point.full_step(result.solution)
        for factor in self.damping.search:
            other = result.shifted(report.damping * (factor - 1))
            report.gradient_equivalents += other.flops / max(3 * point.tape.forward_flops, 1.0)
            if other.status not in (Status.CONVERGED, Status.MAX_ITERATIONS):
                continue
            value = point.full_step(other.solution)
            report.loss_evaluations += 1
            if value < lowest:
                best, lowest, memory["damping"] = other, value, damping * factor
        report.loss_evaluations += 1
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

    def _reject(self, reason: str) -> None:
        self.report.status = f"rejected: {reason}"
        self.report.accepted = False
        self._memory["last"] = None
        self._memory["damping"] = self.damping.raised(self._memory["damping"])
        if self.trust_region is not None:
            self._memory["radius"] = self.trust_region.shrunk(self.radius)


def _fraction_seen(point: Point, curvature: Closure | None) -> float:
    """How many of the samples of the loss the curvature sees, where both are objectives that have been counted."""
    if not (isinstance(point.closure, Objective) and isinstance(curvature, Objective)):
        return 1.0
    return (curvature.total_weight or 1.0) / (point.closure.total_weight or 1.0)


def _ratio(actual: float, predicted: float) -> float:
    """actual / predicted, NaN where no reduction was predicted."""
    return actual / predicted if predicted > 0 else math.nan
