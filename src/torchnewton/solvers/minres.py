"""The minimal residual method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.solvers.iteration import Iterative, MostNegative, accepted, initial_residual, product
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import Vector, add, dot, norm, scale, zeros_like


@dataclass(frozen=True)
class MINRES(Iterative):
    """Minimal residuals for symmetric A, definite or not, with a positive definite preconditioner.

        x_k = argmin ‖b − Ax‖ over x₀ + span{r₀, Ar₀, …, Aᵏ⁻¹r₀}

    Stops as `CG` does, and with `Status.LEAST_SQUARES` where a singular A leaves nothing else to gain: at
    ‖Ar‖ ≤ ε^⅔‖A‖‖r‖, or at the smallest ‖Ar‖ ≤ √ε‖A‖‖r‖ if that grows tenfold while ‖r‖ stays. The residual with the
    most negative curvature is returned; `stop_at_negative_curvature` ends with the iterate before the first one. With
    a preconditioner M the norms are those of M and the directions are Mr.

    Cost: one product and two inner products an iteration, seven vector updates; memory: ten vectors.
    Source: Paige and Saunders, SIAM J. Numer. Anal. 12, 1975; the curvature rᵀAr = −c_{k−1}γ_k⁽¹⁾‖r‖² of the residual
    without a product: Liu and Roosta, SIAM J. Optim. 32, 2022 (arXiv 2206.05732), the NPC condition.
    Deviations: b enters no estimate of ‖A‖; the residual is carried along, so that its 2-norm is at hand with M.

    >>> A, b = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1.0, 2.0])
    >>> MINRES().solve(A, [b]).solution
    [tensor([2., 1.])]
    """

    stop_at_negative_curvature: bool = False

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        r0 = initial_residual(A, b, x0)
        run = _Run(A, preconditioner, r0)
        tolerance, model, found = self._tolerance(b), [0.0], MostNegative()
        status = Status.CONVERGED if norm(r0) <= tolerance else run.start()
        while status is None:
            status = run.advance()
            if status is None and run.is_negative():
                found.show(run.z, run.curvature * run.phi * run.phi)
                status = Status.NEGATIVE_CURVATURE if self.stop_at_negative_curvature else None
            if status is None:
                run.update()
                model.append(self._model(run.d, r0, run.r))
                status = self._status(model, run.r, tolerance)
        d, r = run.flattest if status is Status.LEAST_SQUARES else (run.d, run.r)
        x, r, status = accepted(d if x0 is None else add(x0, d), r, status, x0, r0)
        products = run.num_products + (x0 is not None)
        return SolveResult(x, r, norm(r), status, len(model) - 1, products, found.direction, "MINRES")


class _Run:
    """The letters of Paige and Saunders: Lanczos in the inner product of M (v = Mu), T = QR by rotations (c, s).

    `d`, `r` and `z` = Mr are those of iteration k − 1 between `advance` and `update`, `curvature` = zᵀAz / rᵀz.
    """

    def __init__(self, A: Operator, M: Operator | None, r0: Vector) -> None:
        self.A, self.M = A, M
        self.d, self.r, self.z = zeros_like(r0), r0, r0
        self.w, self.old_w = zeros_like(r0), zeros_like(r0)
        self.u, self.old_u, self.v, self.next_v = r0, zeros_like(r0), r0, r0
        self.alpha = self.beta = self.phi = self.curvature = self.norm = 0.0
        self.c, self.s, self.delta_bar, self.epsilon = -1.0, 0.0, 0.0, 0.0
        self.old_epsilon = self.delta = self.gamma_bar = 0.0
        self.flattest, self.flatness, self.flat_phi = (self.d, self.r), math.inf, 0.0
        self.num_products = 0

    def start(self) -> Status | None:
        status = self._normalize(self.r)
        if status is None and self.beta == 0:
            status = Status.INDEFINITE_PRECONDITIONER
        self.phi, self.z = self.beta, scale(self.next_v, self.beta)
        return status

    def _normalize(self, y: Vector) -> Status | None:
        """The next β, u and v from y = βu; β = 0 at the end of the Krylov space."""
        z = y if self.M is None else product(self.M, y)
        squared = dot(y, z)
        if not math.isfinite(squared):
            return Status.NOT_FINITE
        if squared < -torch.finfo(y[0].dtype).eps * norm(y) * norm(z):
            return Status.INDEFINITE_PRECONDITIONER
        self.beta = math.sqrt(max(squared, 0.0))
        inverse = 1.0 / self.beta if self.beta > 0 else 0.0
        self.old_u, self.u = self.u, scale(y, inverse)
        self.next_v = self.u if z is y else scale(z, inverse)
        return None

    def advance(self) -> Status | None:
        """Row k of T and of R, the curvature of the residual before, and whether that one can still shrink."""
        beta, self.v = self.beta, self.next_v
        y = product(self.A, self.v)
        self.num_products += 1
        if self.num_products > 1:
            y = add(y, self.old_u, -beta)
        self.alpha = dot(self.v, y)
        if not math.isfinite(self.alpha):
            return Status.NOT_FINITE
        status = self._normalize(add(y, self.u, -self.alpha))
        if status is not None:
            return status
        self.old_epsilon, self.epsilon = self.epsilon, self.s * self.beta
        self.delta = self.c * self.delta_bar + self.s * self.alpha
        self.gamma_bar = self.s * self.delta_bar - self.c * self.alpha
        self.delta_bar = -self.c * self.beta
        self.curvature = -self.c * self.gamma_bar
        self.norm = math.hypot(self.norm, self.alpha, self.beta, beta if self.num_products > 1 else 0.0)
        return Status.LEAST_SQUARES if self._nothing_to_gain() else None

    def is_negative(self) -> bool:
        """Whether zᵀAz ≤ 0, and not only by rounding where Ar vanishes."""
        eps, flatness = torch.finfo(self.r[0].dtype).eps, math.hypot(self.gamma_bar, self.delta_bar)
        return self.curvature <= (0.0 if flatness > eps**0.5 * self.norm else -10 * eps * self.norm)

    def _nothing_to_gain(self) -> bool:
        """Keeps the iterate of the smallest ‖Ar‖/‖r‖; from there on rounding errors grow in the null space of A."""
        eps, flatness = torch.finfo(self.r[0].dtype).eps, math.hypot(self.gamma_bar, self.delta_bar)
        if flatness < self.flatness:
            self.flattest, self.flatness, self.flat_phi = (self.d, self.r), flatness, self.phi
        if flatness <= eps ** (2 / 3) * self.norm:
            return True
        turned = self.flatness <= eps**0.5 * self.norm and flatness > 10 * self.flatness
        return turned and self.phi >= (1 - eps**0.5) * self.flat_phi

    def update(self) -> None:
        """The iterate k and its residual."""
        gamma = math.hypot(self.gamma_bar, self.beta)
        self.c, self.s = self.gamma_bar / gamma, self.beta / gamma
        w = add(add(self.v, self.old_w, -self.old_epsilon), self.w, -self.delta)
        self.w, self.old_w = scale(w, 1.0 / gamma), self.w
        self.d = add(self.d, self.w, self.c * self.phi)
        self.phi *= self.s
        self.r = add(scale(self.r, self.s * self.s), self.u, -self.phi * self.c)
        self.z = self.r if self.M is None else add(scale(self.z, self.s * self.s), self.next_v, -self.phi * self.c)
