"""The Lanczos process against its definition, eigenvalues against SciPy, shifted systems against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import DEFINITE, INDEFINITE, SHAPES, SINGULAR, OnLists, random, spectrum

import torchnewton as tn
from torchnewton.vectors import flatten, unflatten

DECAY = spectrum(list(np.geomspace(1e-4, 1e3, 60)))


@pytest.mark.parametrize("name", [*DEFINITE, *INDEFINITE, *SINGULAR])
def test_basis_and_matrix_are_those_of_the_definition(name):
    A = {**DEFINITE, **INDEFINITE, **SINGULAR}[name]
    for k in (1, 3, 50):
        found = tn.Lanczos(k).tridiagonalize(A, [random(len(A))])
        V = torch.stack([flatten(v) for v in found.basis], dim=1)
        size = len(found.basis)
        assert size <= min(k, len(A))
        assert len(found.alpha) == len(found.beta) == size
        last = torch.zeros(len(A), size, dtype=torch.float64)
        last[:, -1] = found.beta[-1] * flatten(found.following)
        torch.testing.assert_close(V.T @ V, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
        torch.testing.assert_close(A @ V, V @ found.matrix() + last, rtol=0, atol=1e-12)
        if k == 50:
            assert float(found.beta[-1]) == 0


def test_reorthogonalization_is_what_keeps_the_basis_orthogonal():
    def defect(reorthogonalize):
        basis = tn.Lanczos(50, reorthogonalize).tridiagonalize(DECAY, [random(60)]).basis
        V = torch.stack([v[0] for v in basis], dim=1)
        return float((V.T @ V - torch.eye(50, dtype=torch.float64)).abs().max())

    assert defect(True) < 1e-13
    assert defect(False) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_eigenvalues_are_scipys_within_their_bounds(dtype):
    A = spectrum([-7.0, *np.linspace(0, 1, 40), 5.0, 8.0])
    exact = np.linalg.eigvalsh(A)
    found = tn.Lanczos(25).eigenvalues(A.to(dtype), [torch.zeros(43, dtype=dtype)], k=2)
    both = scipy.sparse.linalg.eigsh(A.numpy(), k=4, which="BE", return_eigenvectors=False)
    for i in (0, 2, 3):  # the second smallest is inside of the cluster
        assert float(found.values[i]) == pytest.approx(np.sort(both)[i], rel=1e-6)
    for value, bound in zip(found.values.tolist(), found.bounds.tolist(), strict=True):
        assert np.abs(exact - value).min() <= bound + 10 * torch.finfo(dtype).eps * 8


def test_eigenvalues_of_small_and_broken_matrices():
    like = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    found = tn.Lanczos(40).eigenvalues(OnLists(DEFINITE["seventeen"], SHAPES), like, k=20)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(DEFINITE["seventeen"]))
    assert tn.Lanczos(5).eigenvalues(3.0 * torch.eye(4), [torch.zeros(4)]).values.tolist() == pytest.approx([3.0])
    assert not len(tn.Lanczos(5).eigenvalues(math.nan * torch.eye(4), [torch.zeros(4)]).values)
    with pytest.raises(ValueError, match="k=0"):
        tn.Lanczos(5).eigenvalues(torch.eye(4), [torch.zeros(4)], k=0)


def test_one_basis_serves_every_shift():
    A, shifts = INDEFINITE["one negative"], [0.0, 0.5, 3.0, 1e3]
    b = random(len(A))
    operator = OnLists(A, [(2, 3), (), (3,)])
    results = tn.Lanczos(20, rtol=1e-9).solve_shifted(operator, unflatten(b, operator.like), shifts)
    for shift, result in zip(shifts, results, strict=True):
        shifted = A + shift * torch.eye(len(A), dtype=torch.float64)
        assert result.status is tn.Status.CONVERGED
        torch.testing.assert_close(flatten(result.solution), torch.linalg.solve(shifted, b), rtol=1e-9, atol=1e-9)
        assert (result.negative_curvature is not None) == (shift == 0.0)
    assert [result.num_products for result in results] == [10, 0, 0, 0]
    with pytest.raises(ValueError, match="x0 goes with"):
        tn.Lanczos(20).solve_shifted(A, [b], [1.0], [b])


def test_iterates_are_those_of_cg_and_the_direction_that_of_the_smallest_ritz_value():
    A, b = DEFINITE["spread"], random(8)
    for k in range(1, 6):
        expected = tn.CG(rtol=0.0, max_iterations=k).solve(A, [b])
        found = tn.Lanczos(k).solve(A, [b])
        torch.testing.assert_close(found.solution, expected.solution, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.residual, expected.residual, rtol=1e-6, atol=1e-9)
    p = tn.Lanczos(10).solve(INDEFINITE["mixed"], [random(6)]).negative_curvature[0]
    assert float(p @ INDEFINITE["mixed"] @ p) == pytest.approx(-5.0)
    assert float(p.norm()) == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9), st.integers(0, 50), st.integers(1, 9))
def test_ritz_values_lie_within_the_spectrum(values, seed, k):
    A = spectrum(values, seed)
    found = tn.Lanczos(k).eigenvalues(A, [random(len(values))], k=9)
    assert min(values) - 1e-9 <= float(found.values[0]) <= float(found.values[-1]) <= max(values) + 1e-9
    assert bool((found.bounds >= 0).all())
