"""The choice between a factorization and CG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from torchnewton.solvers.cg import CG
from torchnewton.solvers.direct import Direct
from torchnewton.solvers.dual import Dual
from torchnewton.solvers.result import Operator, Solver, SolveResult
from torchnewton.vectors import num_entries


@runtime_checkable
class StatesCosts(Protocol):
    """An operator that says, in floating-point operations, what its product, its matrix and its factor cost."""

    @property
    def product_flops(self) -> float:
        """Of a product."""
        ...

    @property
    def dense_flops(self) -> float:
        """Of the dense matrix."""
        ...

    @property
    def factor_flops(self) -> float:
        """Of the factor R."""
        ...

    @property
    def factor_rows(self) -> int:
        """The rows of R."""
        ...

    def can_form_dense(self) -> bool:
        """Whether matrix and factor are to be had at that cost."""
        ...


@dataclass(frozen=True)
class Auto:
    """The cheapest of `Direct`, `Dual` and `CG`, by counting floating-point operations for P parameters.

    direct:  `A.dense_flops` + P³/3
    dual:    `A.factor_flops` + n²P + n³/3, n = `A.factor_rows`; twice that in float32, since it computes in float64
    CG:      `expected_iterations` · `A.product_flops`, the products of a solve that is as good

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
        n, size = A.factor_rows, num_entries(b)
        dual = (n**2 * size + n**3 / 3) * (1 if b[0].dtype is torch.float64 else 2)
        costs: list[tuple[float, str, Solver]] = [
            (self.expected_iterations * A.product_flops, "CG", self.cg),
            (A.dense_flops + size**3 / 3, "direct", self.direct),
            (A.factor_flops + dual, "dual", self.dual),
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
