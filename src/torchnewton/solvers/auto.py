"""The choice between a factorization and CG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchnewton.costs import StatesCosts
from torchnewton.solvers.cg import CG
from torchnewton.solvers.direct import Direct, direct_flops
from torchnewton.solvers.dual import Dual, dual_flops
from torchnewton.solvers.result import Operator, Solver, SolveResult
from torchnewton.vectors import num_entries


@dataclass(frozen=True)
class Auto:
    """The cheapest of `Direct`, `Dual` and `CG`, by counting floating-point operations for P parameters.

    direct:  the dense matrix + P³/3
    dual:    the factor R + n²P + n³/3, n its rows; twice that in float32, since it computes in float64
    CG:      `expected_iterations` products, those of a solve that is as good

    The operator states the costs, and by `can_form_dense` whether matrix and factor are to be had at them; any other
    operator is solved by CG. `SolveResult.method` says what was chosen and why.
    """

    cg: CG = field(default_factory=lambda: CG(rtol=0.1, max_iterations=20))
    direct: Direct = field(default_factory=Direct)
    dual: Dual = field(default_factory=Dual)
    expected_iterations: int = 50

    def choose(self, A: Operator, b: Sequence[Tensor]) -> tuple[Solver, str]:
        """The solver for a system with this right-hand side, and why."""
        if not isinstance(A, StatesCosts):
            return self.cg, "the operator states no costs"
        stated, size = A.costs(), num_entries(b)
        dual = dual_flops(stated.factor_rows, size) * (1 if b[0].dtype is torch.float64 else 2)
        costs: list[tuple[float, str, Solver]] = [
            (self.expected_iterations * stated.product, "CG", self.cg),
            (stated.dense + direct_flops(size), "direct", self.direct),
            (stated.factor + dual, "dual", self.dual),
        ]
        if size > self.direct.max_parameters:
            del costs[1]
        solver = min(costs, key=lambda entry: entry[0])[2]
        reason = ", ".join(f"{name} {flops:.1e} operations" for flops, name, _ in costs if math.isfinite(flops))
        if solver is not self.cg and not A.can_form_dense():
            return self.cg, "the closure mixes samples, so that exact rows are dear"
        return solver, reason

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
