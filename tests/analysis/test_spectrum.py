"""Spectra of stored matrices against NumPy: extreme eigenvalues, moments, shares, densities, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import torchnewton as tn
from torchnewton.curvature import Diagonal, LinearOperator

BULK = [torch.linspace(-1e-5, 1e-5, 400), torch.linspace(1e-3, 1e-1, 80)]
NETWORK = torch.cat([*BULK, torch.tensor([-0.4, 5.0, 12.0, 40.0])])


class Matrix(LinearOperator):
    """A stored symmetric matrix on vectors of two tensors."""

    def __init__(self, matrix):
        half = len(matrix) // 2
        parts = [torch.zeros(half, dtype=matrix.dtype), torch.zeros(len(matrix) - half, 1, dtype=matrix.dtype)]
        super().__init__(parts, parts, is_symmetric=True)
        self.matrix = matrix

    def apply(self, v):
        flat = self.matrix @ torch.cat([x.reshape(-1) for x in v])
        return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in v]), v, strict=True)]


def dense(values, seed=0, dtype=torch.float64):
    """A matrix with these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return Matrix((Q @ torch.diag(values) @ Q.T).to(dtype))


def gaussian(size=300, seed=0):
    """A matrix of the Gaussian orthogonal ensemble: the semicircle on [−2, 2]."""
    G = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Matrix((G + G.T) / math.sqrt(2 * size))


def within(estimate, truth, errors=4.0):
    return abs(estimate.value - truth) <= errors * estimate.standard_error + 1e-9 * max(1.0, abs(truth))


@pytest.mark.parametrize("make", [gaussian, lambda: dense(NETWORK), lambda: Diagonal([NETWORK.double()])])
def test_the_dense_path_knows_every_eigenvalue(make):
    A = make()
    truth = np.linalg.eigvalsh(A.to_dense().numpy())
    found = tn.spectrum(A)
    assert found.is_exact
    assert found.num_products == len(truth)
    assert found.largest.values.numpy() == pytest.approx(truth[::-1][:5], abs=1e-12)
    assert found.smallest.values.numpy() == pytest.approx(truth[:5], abs=1e-12)
    assert found.trace.value == pytest.approx(truth.sum())
    assert found.share(below=1e-4).value == pytest.approx((np.abs(truth) < 1e-4).mean())
    for low, high in ((-math.inf, 0.5), (0.5, 50.0)):
        share = found.share_between(low, high)
        assert share.value == pytest.approx(((low <= truth) & (truth <= high)).mean())
    errors = [found.trace.standard_error, found.share().standard_error, float(found.density().standard_error.max())]
    assert errors == [0, 0, 0]
    assert not found.largest.bounds.any()


@pytest.mark.parametrize("seed", range(4))
def test_moments_lie_within_their_errors(seed):
    A, generator = gaussian(seed=seed), torch.Generator().manual_seed(seed)
    truth = np.linalg.eigvalsh(A.matrix.numpy())
    found = tn.spectrum(A, exact=False, num_probes=20, num_iterations=30, generator=generator)
    assert not found.is_exact
    assert len(found.probes) == 20
    assert found.num_products == 21 * 30
    for power in (0, 1, 2, 3, 6):
        mean, error = found.mean_of(lambda x, power=power: x**power)
        assert abs(float(mean) - (truth**power).mean()) <= 4 * float(error) + 1e-9
    assert within(found.trace, truth.sum())
    assert found.largest.values[0] == pytest.approx(truth[-1], abs=float(found.largest.bounds[0]))


def test_extreme_eigenvalues_have_an_eigenvalue_within_their_bounds():
    A = dense(NETWORK)
    truth = np.linalg.eigvalsh(A.matrix.numpy())
    found = tn.spectrum(A, exact=False, num_iterations=30, num_extreme=3)
    assert found.largest.values.tolist() == pytest.approx([40, 12, 5])
    assert float(found.smallest.values[0]) == pytest.approx(-0.4)
    for ritz in (found.largest, found.smallest):
        for value, bound in zip(ritz.values.tolist(), ritz.bounds.tolist(), strict=True):
            assert np.abs(truth - value).min() <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_shares_of_a_spectrum_like_that_of_a_network(dtype):
    found = tn.spectrum(dense(NETWORK, dtype=dtype), exact=False, num_iterations=60)
    truth = float((NETWORK.abs() < 1e-4).double().mean())
    assert within(found.share(below=1e-4), truth)
    assert within(found.share_between(-math.inf, -1e-4), 1 / len(NETWORK))
    assert within(found.share_between(1.0, math.inf), 3 / len(NETWORK))
    assert found.halved().share().value == pytest.approx(truth, abs=0.02)
    assert within(found.trace, float(NETWORK.double().sum()))
    assert found.share_between(-math.inf, -1.0).value == 0
    assert within(found.share_between(-math.inf, 1e-4), 401 / len(NETWORK))
    assert found.share_between(-math.inf, 100.0).value == pytest.approx(1)


@pytest.mark.parametrize("num_iterations", [10, 40])
def test_the_bounds_say_what_is_not_resolved(num_iterations):
    values = np.geomspace(1e-7, 10, 300)
    found = tn.spectrum(dense(values), exact=False, num_probes=8, num_iterations=num_iterations)
    for low, high in ((-1e-4, 1e-4), (-math.inf, 0.5), (1e-3, 5.0)):
        least, most = found.share_bounds(low, high)
        truth, error = ((values > low) & (values < high)).mean(), 4 * found.share_between(low, high).standard_error
        assert -1e-9 <= least <= 1e-9 + found.share_between(low, high).value <= most + 1e-9 <= 1 + 1e-8
        assert least - error - 0.03 <= truth <= most + error + 0.03
    assert "with half of the iterations" in str(found)


def test_taking_out_what_has_converged_makes_the_trace_sure():
    found = tn.spectrum(dense(NETWORK), exact=False, num_iterations=60)
    hutchinson = math.sqrt(2 / 5 * float(NETWORK.square().sum()))
    assert len(found.known) >= 4
    assert within(found.trace, float(NETWORK.double().sum()))
    assert found.trace.standard_error < 0.02 * hutchinson


def test_the_density_is_one_in_total_and_follows_the_semicircle():
    found = tn.spectrum(gaussian(), exact=False, num_iterations=80)
    density = found.density()
    assert float(torch.trapezoid(density.value, density.coordinate)) == pytest.approx(1, abs=1e-6)
    inner = density.grid.abs() < 1.5
    circle = (4 - density.grid[inner] ** 2).sqrt() / (2 * math.pi)
    wide = found.density(density.grid, width=0.25)
    assert float((wide.value[inner] - circle).abs().max()) < 0.06
    assert float(wide.standard_error.max()) < 0.05
    exact = tn.spectrum(gaussian()).density(density.grid, width=0.25)
    assert bool(((wide.value - exact.value).abs() <= 5 * wide.standard_error + 2e-3).all())


def test_the_logarithmic_axis_shows_bulk_and_outliers_alike():
    found = tn.spectrum(dense(NETWORK))
    density = found.density(linear_width=1e-4, num_points=2000)
    assert float(torch.trapezoid(density.value, density.coordinate)) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(torch.asinh(density.grid / 1e-4) / math.log(10), density.coordinate)
    one = 1 / len(NETWORK) / (0.1 * math.sqrt(2 * math.pi))
    at_outliers = found.density(torch.tensor([-0.4, 5.0, 12.0, 40.0]), linear_width=1e-4)
    assert at_outliers.value.tolist() == pytest.approx([one] * 4, rel=0.01)


@pytest.mark.parametrize("values", [[2.0] * 7, [0.0] * 5, [1.0, 1.0, -3.0, 4.0]], ids=str)
def test_repeated_eigenvalues_and_more_iterations_than_rows(values):
    found = tn.spectrum(dense(values), exact=False, num_probes=3)
    assert found.trace.value == pytest.approx(sum(values), abs=1e-9)
    assert found.trace.standard_error < 1e-9
    assert found.share(below=0.5).value == pytest.approx(np.mean(np.abs(values) < 0.5))
    assert float(found.largest.values[0]) == pytest.approx(max(values), abs=1e-12)
    assert float(found.smallest.values[0]) == pytest.approx(min(values), abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(-10, 10), min_size=1, max_size=8, unique=True), st.integers(0, 50))
def test_a_complete_krylov_space_is_as_good_as_the_matrix(values, seed):
    found = tn.spectrum(dense(values, seed), exact=False, num_probes=2, num_iterations=20)
    assert found.trace.value == pytest.approx(sum(values), abs=1e-5)
    assert float(found.mean_of(torch.ones_like)[0]) == pytest.approx(1)


def test_the_generator_decides_and_the_default_is_fixed():
    A = gaussian()
    runs = [
        tn.spectrum(A, exact=False, num_iterations=10, generator=g and torch.Generator().manual_seed(g)).trace.value
        for g in (None, None, 1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]
    assert len(set(runs)) == 3


def test_progress_comes_to_an_end():
    seen = []
    tn.spectrum(dense([1.0, 2.0, 3.0]), exact=False, on_product=lambda *event: seen.append(event))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_network_with_many_batches():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2)).double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randint(2, (16,))
    batches = list(zip(x.split(8), y.split(8), strict=True))
    A = tn.Average(batches, list(model.parameters()), lambda b: F.cross_entropy(model(b[0]), b[1]))
    exact, found = tn.spectrum(A), tn.spectrum(A, exact=False)
    assert found.largest.values.tolist() == pytest.approx(exact.largest.values.tolist())
    assert found.trace.value == pytest.approx(exact.trace.value)
    assert "14 eigenvalues, from the dense matrix" in str(exact)


def test_wrong_arguments():
    A = gaussian(10)
    theta = torch.ones(2, requires_grad=True)
    J = tn.Jacobian(tn.record(lambda: F.mse_loss(theta, torch.zeros(2)), [theta]))
    with pytest.raises(ValueError, match="Jacobian is not declared symmetric"):
        tn.spectrum(J)
    for name in ("num_probes", "num_iterations", "num_extreme"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least"):
            tn.spectrum(A, **{name: 0})
    for exact in (True, False):
        with pytest.raises(ValueError, match="not finite"):
            tn.spectrum(Matrix(torch.full((3, 3), math.nan)), exact=exact)
    found = tn.spectrum(A)
    with pytest.raises(ValueError, match="low=1 must be less than high=0"):
        found.share_between(1, 0)
    with pytest.raises(ValueError, match=r"width=0\.0 must be"):
        found.density(width=0.0)
