"""`Direct` and `Dual`: several shifts, several right-hand sides, refinement, and float32 networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn
from torchnewton.curvature import LinearOperator
from torchnewton.curvature.factor import StoredRows
from torchnewton.solvers import dual
from torchnewton.vectors import flatten


class Rows(LinearOperator):
    """RᵀR + σI; with a known y, b = Rᵀy is solved from it."""

    def __init__(self, R: Tensor, sigma: float, y: Tensor | None = None, noise: float = 0.0) -> None:
        like = [torch.zeros(R.shape[1], dtype=R.dtype)]
        super().__init__(like, like, is_symmetric=True, is_positive_semidefinite=True)
        self.R, self.sigma, self.y, self.noise, self.num_grams = R, sigma, y, noise, 0

    def apply(self, v):
        return [self.R.T @ (self.R @ v[0]) + self.sigma * v[0]]

    def to_dense(self):
        return self.R.T @ self.R + self.sigma * torch.eye(self.R.shape[1], dtype=self.R.dtype)

    def factored(self):
        outer = self

        class Known(StoredRows):
            def preimage(self, b):
                return outer.y

            def gram(self, dtype):
                outer.num_grams += 1
                exact = super().gram(dtype)
                return exact + outer.noise * exact.diagonal().mean() * torch.eye(len(exact), dtype=dtype)

        return Known(self.R, self.domain), self.sigma


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(A: Rows, b: Tensor, more: float = 0.0) -> Tensor:
    return torch.linalg.solve(A.to_dense() + more * torch.eye(len(b)), b)


SOLVERS = [tn.Direct(), tn.Dual(), tn.Dual(num_shifts=1000), tn.Dual(max_refinements=0)]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("known", [False, True])
def test_shifts_and_right_hand_sides(solver, shape, known):
    """Shifts are counted from the system they are asked of; `reuse` belongs to the shifted one."""
    R = random(*shape)
    y = random(shape[0], seed=1)
    b, other = (R.T @ y if known else random(shape[1], seed=2)), random(shape[1], seed=3)
    A = Rows(R, 0.1, y if known else None)
    result = solver.solve(A, [b])
    for found, more in ((result, 0.0), (result.shifted(0.5), 0.5), (result.shifted(0.5).shifted(2.0), 2.5)):
        assert found.status is tn.Status.CONVERGED
        assert torch.allclose(found.solution[0], exact(A, b, more), rtol=1e-9)
        assert torch.allclose(found.reuse([other])[0], exact(A, other, more), rtol=1e-9)
        left = b - A.to_dense() @ found.solution[0] - more * found.solution[0]
        assert (found.residual is None) == (known and isinstance(solver, tn.Dual))
        assert found.residual is None or torch.allclose(found.residual[0], left, atol=1e-12)
        assert found.residual_norm == pytest.approx(float(left.norm()), abs=1e-12)
        curvature = found.solution[0] @ (b - left)
        assert found.curved(-float(b @ found.solution[0])) == pytest.approx(float(curvature), rel=1e-9)
    assert torch.equal(b, R.T @ y if known else random(shape[1], seed=2))
    assert A.num_grams <= 1


def test_an_eigendecomposition_for_many_shifts():
    A, b = Rows(random(6, 9), 1e-3), [random(9, seed=1)]
    few, many = tn.Dual(num_shifts=3).solve(A, b), tn.Dual(num_shifts=100).solve(A, b)
    assert "Cholesky" in few.method
    assert "eigendecomposition" in many.method
    for more in (1e-9, 1e-3, 1.0, 1e6):
        assert torch.allclose(few.shifted(more).solution[0], many.shifted(more).solution[0], rtol=1e-8)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2])
def test_refinement_mends_a_rounded_gram_matrix(known, noise, monkeypatch):
    monkeypatch.setattr("torchnewton.curvature.factor.SMALL", 0.0)  # small ones are taken as a matrix in float64
    R, y = random(10, 30), random(10, seed=1)
    A, b = Rows(R, 1.0, y if known else None, noise), R.T @ y
    plain = tn.Dual(rtol=1e-10, max_refinements=0).solve(A, [b])
    mended = tn.Dual(rtol=1e-10, max_refinements=20).solve(A, [b])
    assert mended.status is tn.Status.CONVERGED
    assert torch.allclose(mended.solution[0], exact(A, b), rtol=1e-8)
    if noise:
        assert plain.status is tn.Status.MAX_ITERATIONS
        assert plain.residual_norm > mended.residual_norm


def test_rows_without_content():
    b = [torch.ones(3, dtype=torch.float64)]
    for R in (torch.zeros(2, 3), torch.zeros(0, 3)):
        result = tn.Dual().solve(Rows(R.double(), 0.5), b)
        assert result.status is tn.Status.CONVERGED
        assert torch.allclose(result.solution[0], 2 * b[0])


@pytest.mark.parametrize("num_shifts", [1, 100])
def test_rows_that_are_not_finite_are_a_status(num_shifts):
    R = random(3, 4)
    R[1, 2] = torch.nan
    result = tn.Dual(num_shifts=num_shifts).solve(Rows(R, 0.5), [torch.ones(4, dtype=torch.float64)])
    assert result.status is tn.Status.NOT_FINITE
    assert not result.solution[0].any()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("converges", [True, False])
def test_a_large_system_in_float32_is_refined_in_float64(converges, known, monkeypatch):
    """Factorized in float32 as long as its refinement converges, else in float64 at once."""
    monkeypatch.setattr("torchnewton.curvature.factor.SMALL", 0.0)
    if not converges:
        monkeypatch.setattr(dual, "_GAIN", 0.0)
    dtypes, factorized = [], dual._factorized
    monkeypatch.setattr(dual, "_factorized", lambda K, shift: dtypes.append(K.dtype) or factorized(K, shift))
    R = (random(30, 40) * torch.logspace(0, -3, 30, dtype=torch.float64)[:, None]).float()
    y = random(30, seed=1).float()
    b, sigma = R.T @ y, 1e-4 * float((R @ R.T).norm())
    found = tn.Dual().solve(Rows(R, sigma, y if known else None), [b])
    assert dtypes == ([torch.float32] if converges else [torch.float32, torch.float64])
    expected = exact(Rows(R.double(), sigma), b.double())
    assert found.status is tn.Status.CONVERGED
    assert found.solution[0].dtype is torch.float32
    assert torch.allclose(found.solution[0].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.norm()))


@pytest.fixture(scope="module")
def trained() -> tuple[tn.Tape, tn.Tape]:
    """A network after 60 steps of Adam, when most samples are fitted, in float32 and the same in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
    x = torch.randn(96, 20)
    y = (x @ torch.randn(20, 5)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    exact = copy.deepcopy(model).double()
    return (
        tn.record(lambda: F.cross_entropy(model(x), y), list(model.parameters())),
        tn.record(lambda: F.cross_entropy(exact(x.double()), y), list(exact.parameters())),
    )


@pytest.mark.parametrize("solver", [tn.Dual(), tn.Dual(num_shifts=100), tn.Direct()], ids=repr)
@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
def test_float32_network(trained, solver, damping):
    """Residuals of the exact system, by products through the other path."""
    single, double = trained
    A = tn.GaussNewton(single) + damping
    exact = tn.GaussNewton(double, tn.Jacobian(double)) + damping
    result = solver.solve(A, single.descent)
    b = flatten(single.descent).double()
    assert result.status is tn.Status.CONVERGED
    for found in (result.solution, result.reuse(single.descent)):
        assert (b - exact @ flatten(found).double()).norm() <= 1e-4 * max(1, 1e-3 / damping) * b.norm()


@pytest.mark.parametrize("relative", [1e-5, 1e-6, 1e-7, 1e-8])
def test_a_float32_network_near_a_minimum(relative):
    """RᵀR and the gradient in float32 would leave no digit of the direction for the smallest of these dampings."""
    torch.manual_seed(0)
    double = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    x = torch.linspace(-1, 1, 5000).unsqueeze(1)
    y = torch.sin(6 * x)
    optimizer = tn.Newton(double.parameters(), damping=tn.AutoDamping())
    for _ in range(40):
        optimizer.step(lambda: F.mse_loss(double(x.double()), y.double()))
    single = copy.deepcopy(double).float()
    double = copy.deepcopy(single).double()
    rounded = tn.record(lambda: F.mse_loss(single(x), y), list(single.parameters()))
    tape = tn.record(lambda: F.mse_loss(double(x.double()), y.double()), list(double.parameters()))
    damping = relative * float(torch.linalg.matrix_norm(tn.GaussNewton(tape).to_dense(), 2))
    expected = flatten(tn.Direct().solve(tn.GaussNewton(tape) + damping, tape.descent).solution)
    result = tn.Direct().solve(tn.GaussNewton(rounded) + damping, rounded.descent)
    assert tape.loss < 1e-7
    assert (flatten(result.solution).double() - expected).norm() <= 0.05 * expected.norm()
    assert result.slope == pytest.approx(-float(flatten(tape.descent) @ expected), rel=0.02)


def test_the_known_preimage_is_taken_for_the_gradient_alone(trained):
    _, tape = trained
    R, _ = (tn.GaussNewton(tape) + 0.1).factored()
    back = flatten(R.adjoint(R.preimage(tape.descent)))
    assert (back - flatten(tape.descent)).norm() <= 1e-6 * back.norm()
    assert R.preimage(tape.gradient) is None
    assert R.preimage([2.0 * d for d in tape.descent]) is None
