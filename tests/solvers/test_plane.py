"""The minimum over a plane against the dense projected solve."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import DEFINITE, INDEFINITE, SHAPES, SINGULAR, OnLists, random, spectrum

import torchnewton as tn
from torchnewton.vectors import flatten, unflatten


def projected(A, b, D):
    """The minimizer over the range of D by dense linear algebra."""
    return D @ torch.linalg.pinv(D.T @ A @ D) @ (D.T @ b)


@pytest.mark.parametrize("k", [1, 2, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_the_projected_solution(k, dtype):
    A, b, D = DEFINITE["seventeen"], random(17), random((17, k), 3)
    operator = OnLists(A.to(dtype), SHAPES)
    directions = [unflatten(d.to(dtype), operator.like) for d in D.T.contiguous()]
    result = tn.Plane().over(operator, unflatten(b.to(dtype), operator.like), directions)
    expected = projected(A, b, D)
    precision = 1e-8 if dtype is torch.float64 else 1e-3
    assert result.status is tn.Status.CONVERGED
    assert result.num_products == k
    torch.testing.assert_close(flatten(result.solution).double(), expected, rtol=precision, atol=precision)
    assert result.predicted_reduction == pytest.approx(float(0.5 * b @ expected), rel=precision)
    c = torch.tensor(result.coefficients, dtype=torch.float64)
    torch.testing.assert_close(D @ c, expected, rtol=precision, atol=precision)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100), st.integers(1, 4), st.lists(st.integers(-12, 12), min_size=4, max_size=4))
def test_lengths_dependence_and_zeros_do_not_matter(seed, k, exponents):
    A, b, D = DEFINITE["spread"], random(8, seed), random((8, k), seed + 1)
    expected = projected(A, b, D)
    more = [D[:, 0] * 2.0 + D[:, -1], torch.zeros(8, dtype=torch.float64), -D[:, 0]]
    scaled = [d * 10.0**e for d, e in zip([*D.T, *more], [*exponents, *exponents], strict=False)]
    result = tn.Plane().over(A, [b], [[d] for d in scaled])
    assert result.status is tn.Status.CONVERGED
    torch.testing.assert_close(result.solution[0], expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))
    assert result.predicted_reduction == pytest.approx(float(0.5 * b @ expected), rel=1e-6)


def test_zero_directions_alone_and_zero_gradient():
    zero = torch.zeros(8, dtype=torch.float64)
    for b, direction in ((random(8), zero), (zero, random(8))):
        result = tn.Plane().over(DEFINITE["spread"], [b], [[direction]])
        assert result.status is tn.Status.CONVERGED
        assert result.predicted_reduction == 0
        assert not result.solution[0].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 200), st.integers(1, 3))
def test_negative_curvature_of_the_plane(seed, k):
    A, b, D = INDEFINITE["mixed"], random(6, seed), random((6, k), seed + 1)
    basis, _ = torch.linalg.qr(D)
    values = torch.linalg.eigvalsh(basis.T @ A @ basis)
    result = tn.Plane().over(A, [b], [[d] for d in D.T])
    assert result.predicted_reduction >= 0
    assert (result.status is tn.Status.NEGATIVE_CURVATURE) == (float(values[0]) < 0)
    if result.negative_curvature is not None:
        p = result.negative_curvature[0]
        assert float(p.norm()) == pytest.approx(1.0)
        assert float(p @ A @ p) == pytest.approx(float(values[0]), rel=1e-6, abs=1e-9)
        assert float(b @ p) >= 0


def test_a_direction_without_curvature_is_left_out():
    A = SINGULAR["semidefinite"]
    null = torch.linalg.eigh(A).eigenvectors[:, 0]
    b, other = random(5), random(5, 2)
    result = tn.Plane().over(A, [b], [[null], [other]])
    assert result.status is tn.Status.CONVERGED
    assert math.isfinite(result.predicted_reduction)
    assert float(result.solution[0].norm()) < 100


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_a_status(bad):
    A, b = spectrum([1.0, 2.0, 3.0]), random(3)
    for result in (
        tn.Plane().over(bad * A, [b], [[b]]),
        tn.Plane().over(A, [bad * b], [[b]]),
        tn.Plane().over(A, [b], [[bad * b]]),
    ):
        assert result.status is tn.Status.NOT_FINITE
        assert not result.solution[0].any()
        assert result.coefficients == [0.0]


def test_misuse_names_the_argument():
    with pytest.raises(ValueError, match="no direction"):
        tn.Plane().over(torch.eye(3), [random(3)], [])
    with pytest.raises(ValueError, match="rtol=2"):
        tn.Plane(rtol=2.0)
