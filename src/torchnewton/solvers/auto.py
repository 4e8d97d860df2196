"""The choice between a factorization and CG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchnewton.costs import StatesCosts, cholesky_flops
from torchnewton.solvers.cg import CG
from torchnewton.solvers.direct import Direct
from torchnewton.solvers.dual import Dual
from torchnewton.solvers.result import Operator, Solver, SolveResult
from torchnewton.solvers.rows import Factored
from torchnewton.vectors import num_entries


@dataclass(frozen=True)
class Auto:
    """The cheapest of `Direct`, `Dual` and `CG`, by counting floating-point operations for P parameters.

    direct:  the dense matrix + P³/3 in float64
    dual:    the Gram matrix RRᵀ of n rows + n³/3 in float64, and two products
    CG:      `expected_iterations` products, those of a solve that is as good

    `direct`, `dual` and `cg` are these solvers, with limits and tolerances of their own.

    The operator states the costs, for CG those of the cheaper way to make so many products, and by `can_factor` whether
    the matrices are to be had at them; any other operator is solved by CG. A factorization takes at most `max_bytes`.
    The dual system needs σ > 0 in A = RᵀR + σI; where R has fewer rows than columns and σ is not positive, A has no
    Cholesky factorization either, and CG is left. `SolveResult.method` says what was chosen and why.
    """

    cg: CG = field(default_factory=lambda: CG(rtol=0.1, max_iterations=20))
    direct: Direct = field(default_factory=Direct)
    dual: Dual = field(default_factory=Dual)
    expected_iterations: int = 50
    max_bytes: float = 4e9

    def __post_init__(self) -> None:
        if not (self.expected_iterations >= 1 and self.max_bytes >= 0):
            raise ValueError(
                f"Auto: expected_iterations={self.expected_iterations} must be at least 1, "
                f"max_bytes={self.max_bytes} not negative."
            )

    def choose(self, A: Operator, b: Sequence[Tensor]) -> tuple[Solver, str]:
        """The solver for a system with this right-hand side, and why."""
        if not isinstance(A, StatesCosts):
            return self.cg, "the operator states no costs"
        options = self.options(A, b)
        solver = _cheapest(options)
        if solver is not self.cg and not A.can_factor():
            return self.cg, "the closure mixes samples, so that exact rows are dear"
        if solver is self.dual:
            found = A.factored() if isinstance(A, Factored) else None
            if found is not None and not found[1] > 0 and found[0].num_rows < num_entries(b):
                return self.cg, "fewer rows than parameters and no damping, so that there is no factorization"
            if found is None or not found[1] > 0:
                del options["dual"]
                solver = _cheapest(options)
        reason = ", ".join(f"{name} {flops:.1e} operations" for name, (flops, _) in options.items())
        return solver, reason

    def options(self, A: StatesCosts, b: Sequence[Tensor]) -> dict[str, tuple[float, Solver]]:
        """Operations of every solver that is possible, and the solver."""
        stated, size = A.costs(self.expected_iterations), num_entries(b)
        single = b[0].dtype is not torch.float64
        slow = 2  # a factorization is slower than products
        found: dict[str, tuple[float, Solver]] = {
            "CG": (stated.setup + self.expected_iterations * stated.product, self.cg)
        }
        if size <= self.direct.max_parameters and 16.0 * size**2 <= self.max_bytes:
            found["direct"] = (stated.dense + slow * (1 + single) * cholesky_flops(size), self.direct)
        if 16.0 * stated.gram_rows**2 <= self.max_bytes:
            flops = stated.gram + slow * cholesky_flops(stated.gram_rows) + 2 * stated.product
            found["dual"] = (flops, self.dual)
        return {name: option for name, option in found.items() if math.isfinite(option[0])}

    def solve(
        self,
        A: Operator,
        b: Sequence[Tensor],
        x0: Sequence[Tensor] | None = None,
        preconditioner: Operator | None = None,
    ) -> SolveResult:
        """See `Solver.solve`."""
        solver, reason = self.choose(A, b)
        result = solver.solve(A, b, x0, preconditioner)
        return replace(result, method=f"{result.method}; {reason}")


def _cheapest(options: dict[str, tuple[float, Solver]]) -> Solver:
    return min(options.values(), key=lambda option: option[0])[1]
