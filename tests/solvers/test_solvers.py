"""Every solver against SciPy and NumPy on one table of matrices; statuses, stopping rules, choice of solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchnewton as tn
from torchnewton.costs import Costs
from torchnewton.curvature import Diagonal, LinearOperator
from torchnewton.curvature.factor import StoredRows
from torchnewton.vectors import flatten


def spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T


DEFINITE = {
    "identity": torch.eye(6, dtype=torch.float64),
    "small": torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64),
    "one": torch.tensor([[2.0]], dtype=torch.float64),
    "spread": spectrum([1e-2, 0.1, 1.0, 3.0, 30.0, 100.0]),
    "clustered": spectrum([1.0] * 5 + [50.0] * 5),
    "ill-conditioned": spectrum([1e-6, 1e-3, 1.0, 10.0]),
}


def rhs(A, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(A), generator=generator, dtype=torch.float64)


class Stored(LinearOperator):
    """A stored matrix RᵀR + σI as an operator on two tensors, with costs as told."""

    def __init__(self, R, sigma=0.0, costs=None):
        self.R, self.sigma, self.stated = R, sigma, costs or Costs()
        self.matrix = R.T @ R + sigma * torch.eye(R.shape[1], dtype=R.dtype)
        half = R.shape[1] // 2
        like = [torch.zeros(half, dtype=R.dtype), torch.zeros(R.shape[1] - half, dtype=R.dtype)]
        super().__init__(like, like, is_symmetric=True, is_positive_semidefinite=True)

    def apply(self, v):
        return list((self.matrix @ flatten(v)).split([len(x) for x in self.domain]))

    def to_dense(self):
        return self.matrix

    def factored(self):
        return StoredRows(self.R, self.domain), self.sigma

    def costs(self, num_products=1):
        return self.stated


@pytest.mark.parametrize("name", DEFINITE)
@pytest.mark.parametrize("solver", [tn.CG(rtol=1e-13, max_iterations=200), tn.Direct(), tn.Auto()], ids=repr)
def test_solves_definite_systems(name, solver):
    A, b = DEFINITE[name], rhs(DEFINITE[name])
    if isinstance(solver, tn.Auto):
        solver = tn.Auto(cg=tn.CG(rtol=1e-13, max_iterations=200))
    result = solver.solve(A, [b])
    expected = torch.from_numpy(np.linalg.solve(A.numpy(), b.numpy()))
    assert result.status is tn.Status.CONVERGED
    assert torch.allclose(result.solution[0], expected, rtol=1e-7, atol=1e-9)
    assert torch.allclose(result.residual[0], b - A @ result.solution[0], atol=1e-9)
    assert result.residual_norm == pytest.approx(float(result.residual[0].norm()), abs=1e-12)


@pytest.mark.parametrize("name", ["spread", "clustered"])
def test_cg_has_scipys_iterates(name):
    A, b = DEFINITE[name], rhs(DEFINITE[name])
    iterates: list[np.ndarray] = []
    scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=0, maxiter=4, callback=lambda x: iterates.append(x.copy()))
    for k, expected in enumerate(iterates, start=1):
        result = tn.CG(rtol=0.0, max_iterations=k).solve(A, [b])
        assert result.num_iterations == result.num_products == k
        assert np.allclose(result.solution[0].numpy(), expected, rtol=1e-9)


def test_cg_with_preconditioner_and_start():
    A, b = DEFINITE["spread"], rhs(DEFINITE["spread"])
    exact = tn.CG(rtol=1e-13, max_iterations=100).solve(A, [b]).solution
    inverse = torch.linalg.inv(A)
    preconditioned = tn.CG(rtol=1e-10).solve(A, [b], preconditioner=inverse)
    assert preconditioned.num_iterations <= 2
    assert torch.allclose(preconditioned.solution[0], exact[0], rtol=1e-7)
    jacobi = tn.CG(rtol=1e-12).solve(A, [b], preconditioner=Diagonal([1 / A.diagonal()]))
    assert torch.allclose(jacobi.solution[0], exact[0], rtol=1e-7)
    started = tn.CG(rtol=1e-8).solve(A, [b], x0=exact)
    assert started.num_iterations == 0
    assert started.status is tn.Status.CONVERGED
    assert torch.equal(started.solution[0], exact[0])


def test_zero_right_hand_side():
    A = DEFINITE["spread"]
    for solver in (tn.CG(), tn.Direct()):
        result = solver.solve(A, [torch.zeros(len(A), dtype=torch.float64)])
        assert result.status is tn.Status.CONVERGED
        assert not result.solution[0].any()


def test_indefinite_matrix_gives_the_iterate_and_the_direction():
    A, b = spectrum([-1.0, 1.0, 2.0, 5.0]), torch.ones(4, dtype=torch.float64)
    result = tn.CG(rtol=1e-12).solve(A, [b])
    assert result.status is tn.Status.NEGATIVE_CURVATURE
    p = result.negative_curvature[0]
    assert float(p @ A @ p) <= 0
    assert torch.isfinite(result.solution[0]).all()
    assert tn.Direct().solve(A, [b]).status is tn.Status.NOT_POSITIVE_DEFINITE
    assert not tn.Direct().solve(A, [b]).solution[0].any()


def test_singular_matrix():
    A = spectrum([0.0, 1.0, 2.0])
    b = A @ torch.ones(3, dtype=torch.float64)
    result = tn.CG(rtol=1e-10).solve(A, [b])
    assert result.status is tn.Status.CONVERGED
    assert torch.allclose(A @ result.solution[0], b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_is_a_status(bad):
    A = DEFINITE["small"].clone()
    A[0, 0] = bad
    b = torch.ones(2, dtype=torch.float64)
    for solver in (tn.CG(), tn.Direct()):
        result = solver.solve(A, [b])
        assert result.status is tn.Status.NOT_FINITE
        assert torch.isfinite(result.solution[0]).all()
    wrong = tn.CG().solve(DEFINITE["small"], [torch.tensor([math.nan, 1.0], dtype=torch.float64)])
    assert wrong.status is tn.Status.NOT_FINITE


def test_iteration_limit():
    A, b = DEFINITE["spread"], rhs(DEFINITE["spread"])
    result = tn.CG(rtol=1e-12, max_iterations=2).solve(A, [b])
    assert result.status is tn.Status.MAX_ITERATIONS
    assert result.num_iterations == 2


def test_absolute_tolerance():
    A, b = DEFINITE["spread"], rhs(DEFINITE["spread"])
    loose = tn.CG(rtol=0.0, atol=0.5 * float(b.norm())).solve(A, [b])
    assert loose.residual_norm <= 0.5 * float(b.norm())
    assert loose.num_iterations < tn.CG(rtol=1e-10).solve(A, [b]).num_iterations


def test_max_norm_stop():
    A, b = DEFINITE["spread"], rhs(DEFINITE["spread"])
    result = tn.CG(rtol=0.0, max_iterations=100, stop=tn.MaxNorm(1e-3)).solve(A, [b])
    assert result.status is tn.Status.CONVERGED
    assert float(result.residual[0].abs().max()) <= 1e-3
    short = tn.CG(rtol=0.0, max_iterations=result.num_iterations - 1).solve(A, [b])
    assert float(short.residual[0].abs().max()) > 1e-3


def test_martens_stop_at_the_iteration_of_his_rule():
    A = spectrum(list(np.geomspace(1e-2, 1e2, 80)))
    b = rhs(A)
    models = []
    for k in range(1, 81):
        x = tn.CG(rtol=0.0, max_iterations=k).solve(A, [b]).solution[0]
        models.append(float(0.5 * x @ A @ x - b @ x))
    expected = next(
        i
        for i in range(1, 81)
        for k in [max(10, math.ceil(0.1 * i))]
        if i > k and (models[i - 1] - models[i - 1 - k]) / models[i - 1] < k * 5e-4
    )
    result = tn.CG(rtol=0.0, max_iterations=200, stop=tn.MartensProgress()).solve(A, [b])
    assert result.status is tn.Status.PROGRESS
    assert result.num_iterations == expected


@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (8, 3), (1, 5), (200, 150), (150, 200)])
@pytest.mark.parametrize("sigma", [1.0, 1e-6])
def test_dual_equals_the_dense_solution(rows, columns, sigma):
    generator = torch.Generator().manual_seed(0)
    A = Stored(torch.randn(rows, columns, generator=generator, dtype=torch.float64), sigma)
    b = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in A.domain]
    result = tn.Dual().solve(A, b)
    expected = torch.linalg.solve(A.matrix, flatten(b))
    assert result.status is tn.Status.CONVERGED
    assert float((flatten(result.solution) - expected).norm()) <= 1e-6 * float(expected.norm())
    again = result.reuse([2.0 * x for x in b])
    assert torch.allclose(flatten(again), 2 * flatten(result.solution))


def test_dual_says_what_it_needs():
    with pytest.raises(ValueError, match="no factor"):
        tn.Dual().solve(DEFINITE["small"], [rhs(DEFINITE["small"])])
    undamped = Stored(torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="damping must be positive"):
        tn.Dual().solve(undamped, [torch.ones(1, dtype=torch.float64)] * 2)


@pytest.mark.parametrize(
    ("costs", "method"),
    [
        (Costs(product=1e2, dense=1e3, gram=1e6, gram_rows=4, setup=1e9), "direct"),
        (Costs(product=1e2, dense=1e9, gram=1e3, gram_rows=4, setup=1e9), "dual"),
        (Costs(product=1e2, dense=1e9, gram=1e9, gram_rows=4), "CG"),
    ],
)
def test_auto_takes_the_cheapest_and_says_why(costs, method):
    A = Stored(torch.eye(4, dtype=torch.float64), 1.0, costs)
    b = [torch.ones(2, dtype=torch.float64)] * 2
    result = tn.Auto().solve(A, b)
    assert result.method.startswith(method)
    assert "operations" in result.method
    assert torch.allclose(flatten(result.solution), 0.5 * torch.ones(4, dtype=torch.float64))


def test_direct_refuses_what_would_not_fit():
    with pytest.raises(ValueError, match=r"max_parameters=3"):
        tn.Direct(max_parameters=3).solve(torch.eye(4), [torch.ones(4)])


@pytest.mark.parametrize("arguments", [{"rtol": -1.0}, {"atol": -1.0}, {"max_iterations": 0}])
def test_misuse_of_cg_names_the_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        tn.CG(**arguments)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12), st.integers(0, 10))
def test_cg_reduces_the_model_and_meets_its_tolerance(values, seed):
    A = spectrum(values, seed)
    b = rhs(A, seed)
    result = tn.CG(rtol=1e-6, max_iterations=500).solve(A, [b])
    x = result.solution[0]
    assert result.status is tn.Status.CONVERGED
    assert float((b - A @ x).norm()) <= 1.01e-6 * float(b.norm()) + 1e-12
    assert float(0.5 * x @ A @ x - b @ x) <= 0
