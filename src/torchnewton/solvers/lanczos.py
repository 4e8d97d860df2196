"""The Lanczos process: extreme eigenvalues, and one basis for every shift of a system."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.solvers.iteration import accepted, combine, initial_residual, product
from torchnewton.solvers.result import Operator, SolveResult, Status
from torchnewton.vectors import (
    Vector,
    add,
    add_,
    clone,
    dot,
    is_distributed,
    norm,
    num_entries,
    scale,
    stored_like,
    zeros_like,
)


@dataclass(frozen=True)
class LanczosResult:
    """AV = VT + β_k v_{k+1}eₖᵀ with orthonormal V = [v₁ … v_k] and T = tridiag(β, α, β).

    `alpha` and `beta` hold k numbers each in float64, `beta[-1]` being β_k: 0 where the Krylov space ended. `basis` is
    V, `following` is v_{k+1} (zeros there), `finite` is False when a product was not finite and the process ended.
    """

    alpha: Tensor
    beta: Tensor
    basis: list[Vector]
    following: Vector
    finite: bool

    def matrix(self) -> Tensor:
        """T in float64."""
        off = self.beta[:-1]
        return torch.diag(self.alpha) + torch.diag(off, 1) + torch.diag(off, -1)

    def combine(self, coefficients: Tensor) -> Vector:
        """Vc; Ritz vectors are those of eigenvectors of T."""
        return combine(self.basis, coefficients)


@dataclass(frozen=True)
class RitzValues:
    """Ascending estimates of eigenvalues; each has an eigenvalue of A within its bound: βₖ|eₖᵀs| for Ts = θs."""

    values: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class Lanczos:
    """`num_iterations` steps of the Lanczos process on symmetric A, fewer where the Krylov space ends (β ≤ nε‖T‖).

        A V = V T + βₖ vₖ₊₁ eₖᵀ,    x(σ) = x₀ + ‖r₀‖ V (T + σI)⁻¹ e₁

    The solution is the Galerkin one: that of CG for positive definite A, and also for indefinite A, where T is not
    singular (if it is, its null space is left out). Its smallest eigenvalue gives the direction of negative curvature.
    `rtol` and `atol` decide the status only. `preconditioner` is not used.

    Cost: k products, and k²/2 inner products (twice) with `reorthogonalize`; memory: k + 2 vectors.
    Source: Golub and Van Loan, "Matrix computations", sections 10.1 and 10.3; Paige, J. Inst. Math. Appl. 18, 1976.

    >>> A, b = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.tensor([2.0, 2.0, 2.0])
    >>> [x.solution[0] for x in Lanczos(3).solve_shifted(A, [b], [0.0, 1.0])]
    [tensor([2.0000, 1.0000, 0.5000]), tensor([1.0000, 0.6667, 0.4000])]
    """

    num_iterations: int
    reorthogonalize: bool = True
    rtol: float = 1e-5
    atol: float = 0.0

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"Lanczos: num_iterations={self.num_iterations} must be at least 1.")
        if self.rtol < 0 or self.atol < 0:
            raise ValueError(f"Lanczos: rtol={self.rtol} and atol={self.atol} must not be negative.")

    def tridiagonalize(self, A: Operator, start: Sequence[Tensor]) -> LanczosResult:
        """T and V of the Krylov space of `start`; empty for a start that is zero or not finite."""
        return self.tridiagonalize_each(lambda vs: [product(A, v) for v in vs], [start])[0]

    def tridiagonalize_each(
        self, multiply: Callable[[list[Vector]], list[Vector]], starts: Sequence[Sequence[Tensor]]
    ) -> list[LanczosResult]:
        """Those of several starts; one product of each at a time, for operators that multiply many vectors at once."""
        processes = [_Process(self, start) for start in starts]
        while waiting := [p for p in processes if p.is_running]:
            for p, w in zip(waiting, multiply([p.v for p in waiting]), strict=True):
                p.take(w)
        return [p.result() for p in processes]

    def eigenvalues(
        self, A: Operator, like: Sequence[Tensor], k: int = 1, generator: torch.Generator | None = None
    ) -> RitzValues:
        """The k smallest and k largest Ritz values (all where there are fewer than 2k) from a normal random start.

        A repeated eigenvalue is found once. `like` gives the shapes; without `generator` the seed is 0. Values are
        missing where products are not finite.
        """
        if k < 1:
            raise ValueError(f"Lanczos.eigenvalues: k={k} must be at least 1.")
        found = self.tridiagonalize(A, random_like(like, generator))
        values, vectors = torch.linalg.eigh(found.matrix())
        bounds = found.beta[-1:] * vectors[-1:].abs().reshape(-1)
        ends = slice(None) if len(values) <= 2 * k else [*range(k), *range(-k, 0)]
        return RitzValues(values[ends], bounds[ends])

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        return self.solve_shifted(A, b, [0.0], x0)[0]

    def solve_shifted(
        self, A: Operator, b: Sequence[Tensor], shifts: Sequence[float], x0: Sequence[Tensor] | None = None
    ) -> list[SolveResult]:
        """Solve (A + σI)x = b for every shift σ from one basis; the first result counts the products.

        A start x₀ would give every shift another Krylov space: it goes with the one shift 0.
        """
        if x0 is not None and any(shifts):
            raise ValueError(f"Lanczos.solve_shifted: x0 goes with shifts=[0.0] only, not with {list(shifts)}.")
        r0 = initial_residual(A, b, x0)
        found = self.tridiagonalize(A, r0)
        length = norm(r0)
        system = _System(found, length, b[0].dtype)
        dropped = not found.finite and math.isfinite(length)  # the last product
        tolerance = max(self.rtol * norm(b), self.atol)
        results = []
        for i, shift in enumerate(shifts):
            d, r, negative = system.solve(shift, r0)
            status = Status.CONVERGED if norm(r) <= tolerance else Status.MAX_ITERATIONS
            if not found.finite:
                status = Status.NOT_FINITE
            elif status is Status.MAX_ITERATIONS and not float(found.beta[-1]) and system.is_singular(shift):
                status = Status.LEAST_SQUARES
            x = d if x0 is None else add(x0, d)
            x, r, status = accepted(x, r, status, x0, r0)
            products = 0 if i else len(found.basis) + dropped + (x0 is not None)
            results.append(SolveResult(x, r, norm(r), status, len(found.basis), products, negative, "Lanczos"))
        return results


class _Process:
    """The process from one start; it waits for the product with `v`."""

    def __init__(self, lanczos: Lanczos, start: Sequence[Tensor]) -> None:
        self.limit, self.reorthogonalize = lanczos.num_iterations, lanczos.reorthogonalize
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.basis: list[Vector] = []
        self.rows = Rows(start, min(self.limit, num_entries(start))) if self.reorthogonalize else None
        self.length, self.largest = norm(start), 0.0
        self.finite = math.isfinite(self.length)
        self.v = scale(start, 1.0 / self.length) if self.finite and self.length > 0 else zeros_like(start)

    @property
    def is_running(self) -> bool:
        """Whether there is a next step."""
        return self.finite and self.length > 0 and len(self.basis) < self.limit

    def take(self, w: Vector) -> None:
        """One step with w = Av; a step that is not finite is dropped."""
        a = dot(self.v, w)
        w = add(w, self.v, -a)
        if self.basis:
            add_(w, self.basis[-1], -self.beta[-1])
        v = self.v
        if self.rows is not None:
            v = self.rows.append(v)
            for _ in range(2):  # twice is enough
                self.rows.remove_from(w)
        length = norm(w)
        self.finite = math.isfinite(a) and math.isfinite(length)
        if not self.finite:
            return
        self.largest = max(self.largest, abs(a) + length + (self.beta[-1] if self.beta else 0.0))
        whole_space = self.rows is not None and self.rows.size == num_entries(w)  # what is left is rounding
        if whole_space or length <= (len(self.basis) + 1) * torch.finfo(w[0].dtype).eps * self.largest:
            length = 0.0
        self.alpha.append(a)
        self.beta.append(length)
        self.basis.append(v)
        self.length, self.v = length, scale(w, 1.0 / length) if length > 0 else zeros_like(w)

    def result(self) -> LanczosResult:
        """What was found."""
        T = (torch.tensor(self.alpha, dtype=torch.float64), torch.tensor(self.beta, dtype=torch.float64))
        return LanczosResult(*T, self.basis, self.v, self.finite)


class Rows:
    """Vectors stored as the rows of one matrix for each tensor, so that a projection is two products with each.

    DTensors, of which this process may hold a part, stay as they are: a projection is an inner product for each vector.
    """

    def __init__(self, like: Sequence[Tensor], limit: int) -> None:
        self.kept: list[Vector] | None = [] if any(map(is_distributed, like)) else None
        self.parts = [] if self.kept is not None else [x.new_empty(limit, x.numel()) for x in like]
        self.size = 0

    def append(self, v: Sequence[Tensor]) -> Vector:
        """The stored copy of v."""
        self.size += 1
        if self.kept is not None:
            self.kept.append(clone(v))
            return self.kept[-1]
        rows = [part[self.size - 1] for part in self.parts]
        for row, x in zip(rows, v, strict=True):
            row.copy_(x.reshape(-1))
        return [row.view(x.shape) for row, x in zip(rows, v, strict=True)]

    def remove_from(self, w: Vector) -> None:
        """w ← w − RᵀRw."""
        if self.kept is not None:
            shares = [dot(v, w) for v in self.kept]
            for v, share in zip(self.kept, shares, strict=True):
                add_(w, v, -share)
            return
        parts = [part[: self.size] for part in self.parts]
        c = torch.stack([part @ x.reshape(-1) for part, x in zip(parts, w, strict=True)]).sum(0)
        for part, x in zip(parts, w, strict=True):
            x -= (c @ part).view(x.shape)


class _System:
    """T diagonalized once: (T + σI)y = ‖r₀‖e₁ for every σ."""

    def __init__(self, found: LanczosResult, length: float, dtype: torch.dtype) -> None:
        self.found, self.length = found, length
        self.theta: Tensor
        self.S: Tensor
        self.theta, self.S = torch.linalg.eigh(found.matrix())
        self.precision = torch.finfo(dtype).eps * len(self.theta)

    def _kept(self, shift: float) -> Tensor:
        size = (self.theta + shift).abs()
        return size > self.precision * size.max()

    def is_singular(self, shift: float) -> bool:
        """Whether T + σI is, to working precision."""
        return not bool(self._kept(shift).all())

    def solve(self, shift: float, r0: Vector) -> tuple[Vector, Vector, Vector | None]:
        """The correction, its residual, and the direction of negative curvature."""
        if not len(self.theta):
            return zeros_like(r0), r0, None
        shifted = self.theta + shift
        kept = self._kept(shift)
        inverse = torch.where(kept, 1.0 / shifted, 0.0)
        weights = self.length * self.S[0]
        y = self.S @ (inverse * weights)
        lost = self.S @ torch.where(kept, 0.0, weights)
        last = scale(self.found.following, -float(self.found.beta[-1] * y[-1]))
        residual = last if bool(kept.all()) else add(self.found.combine(lost), last)
        negative = self.found.combine(self.S[:, 0]) if shifted[0] < 0 and bool(kept[0]) else None
        return self.found.combine(y), residual, negative


def random_like(like: Sequence[Tensor], generator: torch.Generator | None = None) -> Vector:
    """Normal random numbers in these shapes; without a generator from the seed 0, the same on every device."""
    generator = generator or torch.Generator().manual_seed(0)
    found = [torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device) for x in like]
    return [stored_like(number.to(x.device), x) for number, x in zip(found, like, strict=True)]
