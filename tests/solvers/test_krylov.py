"""MINRES, BiCGSTAB, Steihaug's CG and Lanczos on one table of systems, against NumPy and SciPy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import DEFINITE, INDEFINITE, SHAPES, SINGULAR, OnLists, random, spectrum

import torchnewton as tn
from torchnewton.vectors import dot, flatten, is_finite, norm, unflatten

TIGHT = {"rtol": 1e-11, "max_iterations": 200}
ANY_SYMMETRIC = [tn.MINRES(**TIGHT), tn.BiCGSTAB(**TIGHT), tn.Lanczos(60, rtol=1e-11)]
ALL = [tn.CG(**TIGHT), tn.SteihaugCG(radius=1e9, **TIGHT), *ANY_SYMMETRIC]
TABLE = [(s, A) for s in ALL for A in DEFINITE.items()] + [
    (s, A) for s in ANY_SYMMETRIC for A in INDEFINITE.items() if not (isinstance(s, tn.BiCGSTAB) and A[0] == "exchange")
]


def label(value):
    return value[0] if isinstance(value, tuple) else type(value).__name__ if not isinstance(value, str) else value


def quadratic(A, b, x):
    return float(0.5 * x @ A @ x - b @ x)


def check_result(A, b, result, tolerance=1e-6):
    """What holds for every result: finite, residual as told, curvature as told."""
    x = flatten(result.solution).double()
    assert is_finite(result.solution)
    assert float((b - A @ x - flatten(result.residual).double()).norm()) <= tolerance * float(b.norm() + 1e-30)
    assert result.residual_norm == pytest.approx(float(flatten(result.residual).norm()), rel=1e-5)
    if result.negative_curvature is not None:
        p = flatten(result.negative_curvature).double()
        assert float(p.norm()) > 0
        assert float(p @ A @ p) <= 1e-12 * float(p @ p)
    return x


@pytest.mark.parametrize(("solver", "system"), TABLE, ids=label)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_solves_as_numpy_does(solver, system, dtype):
    A, b = system[1], random(len(system[1]))
    if dtype is torch.float32:
        if system[0] == "ill-conditioned":
            return
        solver = replace(solver, rtol=1e-6)
    result = solver.solve(A.to(dtype), [b.to(dtype)])
    assert result.status is tn.Status.CONVERGED
    precision = 1e-6 if dtype is torch.float64 else 1e-3
    x = check_result(A, b, result, 10 * precision)
    assert result.solution[0].dtype == dtype
    np.testing.assert_allclose(x.numpy(), np.linalg.solve(A, b), rtol=precision, atol=precision)
    definite = system[0] in DEFINITE
    assert not definite or result.negative_curvature is None


@pytest.mark.parametrize("solver", ALL, ids=label)
def test_lists_of_odd_shapes_give_what_the_flat_vector_gives(solver):
    A, b = DEFINITE["seventeen"], random(17)
    operator = OnLists(A, SHAPES)
    flat, listed = solver.solve(A, [b]), solver.solve(operator, unflatten(b, operator.like))
    assert [x.shape for x in listed.solution] == [torch.Size(shape) for shape in SHAPES]
    assert (listed.status, listed.num_iterations) == (flat.status, flat.num_iterations)
    torch.testing.assert_close(flatten(listed.solution), flat.solution[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ALL, ids=label)
def test_zero_right_hand_side_and_exact_start(solver):
    A, b = DEFINITE["spread"], random(8)
    nothing = solver.solve(A, [torch.zeros(8, dtype=torch.float64)])
    assert (nothing.status, nothing.num_iterations) == (tn.Status.CONVERGED, 0)
    assert not nothing.solution[0].any()
    exact = torch.linalg.solve(A, b)
    started = replace(solver, rtol=1e-8).solve(A, [b], x0=[exact])
    assert started.status is tn.Status.CONVERGED
    torch.testing.assert_close(started.solution[0], exact, rtol=1e-12, atol=0)
    assert isinstance(solver, tn.Lanczos) or started.num_iterations == 0
    near = exact + 0.1 * random(8, 3)
    torch.testing.assert_close(solver.solve(A, [b], x0=[near]).solution[0], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("solver", [tn.MINRES(**TIGHT), tn.Lanczos(60, rtol=1e-11)], ids=label)
@pytest.mark.parametrize("consistent", [True, False])
def test_singular_systems_give_the_smallest_residual(name, solver, consistent):
    A = SINGULAR[name]
    b = A @ random(len(A)) if consistent else random(len(A))
    result = solver.solve(A, [b])
    x = check_result(A, b, result)
    smallest = (b - A @ torch.linalg.pinv(A) @ b).norm()
    assert result.status is (tn.Status.CONVERGED if consistent else tn.Status.LEAST_SQUARES)
    assert float((b - A @ x).norm()) == pytest.approx(float(smallest), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_minres_stops_before_rounding_fills_the_null_space(dtype):
    A, b = spectrum([0.0] * 20 + list(np.geomspace(1e-2, 1, 130))), random(150)
    result = tn.MINRES(rtol=1e-9, max_iterations=1000).solve(A.to(dtype), [b.to(dtype)])
    x = check_result(A, b, result, 1e-3)
    precision = 1e-7 if dtype is torch.float64 else 1e-3
    assert result.status is tn.Status.LEAST_SQUARES
    assert result.negative_curvature is None
    smallest = b - A @ torch.linalg.pinv(A, rtol=1e-9) @ b
    assert float((b - A @ x).norm()) == pytest.approx(float(smallest.norm()), rel=precision)
    assert float((A @ (b - A @ x)).norm()) <= precision * float(b.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_minres_does_not_take_ill_conditioned_for_singular(dtype):
    A = spectrum(list(np.geomspace(1e-5, 1, 100)))
    result = tn.MINRES(rtol=1e-4, max_iterations=5000).solve(A.to(dtype), [random(100).to(dtype)])
    assert result.status is tn.Status.CONVERGED


def test_bicgstab_ends_with_its_best_iterate():
    A, b = spectrum([0.0] * 20 + list(np.geomspace(1e-2, 1, 130))), random(150)
    result = tn.BiCGSTAB(rtol=1e-9, max_iterations=9999).solve(A.float(), [b.float()])
    assert result.status is tn.Status.BREAKDOWN
    assert float((b - A @ result.solution[0].double()).norm()) < 0.6 * float(b.norm())


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("solver", ALL, ids=label)
def test_singular_systems_never_break_a_solver(name, solver):
    A = SINGULAR[name]
    result = solver.solve(A, [random(len(A))])
    assert is_finite(result.solution)
    assert result.status is not tn.Status.NOT_FINITE


SCIPY = {"CG": scipy.sparse.linalg.cg, "MINRES": scipy.sparse.linalg.minres, "BiCGSTAB": scipy.sparse.linalg.bicgstab}


@pytest.mark.parametrize("name", SCIPY)
@pytest.mark.parametrize("started", [False, True], ids=["", "x0"])
@pytest.mark.parametrize("preconditioned", [False, True], ids=["", "M"])
def test_iterates_are_scipys(name, started, preconditioned):
    matrices = {
        "CG": [DEFINITE["seventeen"], DEFINITE["spread"]],
        "MINRES": [DEFINITE["seventeen"], DEFINITE["spread"], INDEFINITE["one negative"]],
        # SciPy's own iterates for "spread" differ by 1e-7 after a change of b by one unit of rounding.
        "BiCGSTAB": [DEFINITE["seventeen"], INDEFINITE["one negative"], 3 * torch.eye(9).double() + random((9, 9))],
    }[name]
    for A in matrices:
        n = len(A)
        b, x0 = random(n), random(n, 2) if started else None
        M = torch.diag(torch.linspace(1, 3, n, dtype=torch.float64)) if preconditioned else None
        iterates = []
        start, inverse = (None if x is None else x.numpy() for x in (x0, M))
        options = {"x0": start, "M": inverse, "rtol": 1e-14, "maxiter": 5}
        SCIPY[name](A.numpy(), b.numpy(), **options, callback=lambda x, i=iterates: i.append(x.copy()))
        assert len(iterates) == 5
        for k, expected in enumerate(iterates, start=1):
            solver = getattr(tn, name)(rtol=0.0, max_iterations=k)
            result = solver.solve(A, [b], None if x0 is None else [x0], M)
            assert result.num_iterations == k
            assert result.num_products == (2 * k if name == "BiCGSTAB" else k) + started
            np.testing.assert_allclose(result.solution[0], expected, rtol=1e-8, atol=1e-9)
            check_result(A, b, result)


@pytest.mark.parametrize(
    "solver", [tn.MINRES(**TIGHT), tn.BiCGSTAB(**TIGHT), tn.SteihaugCG(radius=1e6, **TIGHT)], ids=label
)
def test_the_exact_inverse_as_preconditioner_needs_two_iterations(solver):
    A, b = DEFINITE["spread"], random(8)
    result = solver.solve(A, [b], preconditioner=torch.linalg.inv(A))
    assert result.status is tn.Status.CONVERGED
    assert result.num_iterations <= 2
    check_result(A, b, result)


@pytest.mark.parametrize("solver", [tn.CG(), tn.MINRES(), tn.SteihaugCG(radius=1.0)], ids=label)
def test_an_indefinite_preconditioner_is_a_status(solver):
    A, b = DEFINITE["spread"], random(8)
    for M in (-torch.eye(8, dtype=torch.float64), torch.diag(torch.tensor([1.0] * 7 + [-1e3], dtype=torch.float64))):
        result = solver.solve(A, [b], preconditioner=M)
        assert result.status is tn.Status.INDEFINITE_PRECONDITIONER
        assert is_finite(result.solution)


class Failing:
    """Products that are not finite from the k-th on."""

    def __init__(self, matrix, k, bad):
        self.matrix, self.left, self.bad = matrix, k, bad

    def __matmul__(self, v):
        self.left -= 1
        return self.matrix @ v if self.left > 0 else torch.full_like(v, self.bad)


@pytest.mark.parametrize("solver", ALL, ids=label)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["A", "M"])
def test_products_that_are_not_finite_give_the_last_finite_iterate(solver, bad, where):
    if isinstance(solver, tn.Lanczos) and where == "M":
        return
    A, b = DEFINITE["seventeen"], random(17)
    for k in range(1, 8):
        failing = _Listed(Failing(A if where == "A" else torch.eye(17, dtype=torch.float64), k, bad))
        result = solver.solve(failing, [b]) if where == "A" else solver.solve(A, [b], preconditioner=failing)
        assert result.status is tn.Status.NOT_FINITE
        check_result(A, b, result)
        if result.num_iterations and not isinstance(solver, (tn.Lanczos, tn.BiCGSTAB)):
            healthy = replace(solver, max_iterations=result.num_iterations).solve(A, [b])
            torch.testing.assert_close(result.solution, healthy.solution)
    bad_b = torch.where(torch.arange(17) == 3, bad, b)
    wrong = solver.solve(A, [bad_b])
    assert wrong.status is tn.Status.NOT_FINITE
    assert is_finite(wrong.solution)


class _Listed:
    def __init__(self, flat):
        self.flat = flat

    def __matmul__(self, v):
        return [self.flat @ v[0]]


def test_minres_directions_of_negative_curvature():
    A, b = INDEFINITE["one negative"], random(10)
    M = torch.diag(torch.linspace(1, 3, 10, dtype=torch.float64))
    for preconditioner in (None, M):
        residuals = [b]
        for k in range(1, 10):
            residuals += tn.MINRES(rtol=0.0, max_iterations=k).solve(A, [b], preconditioner=preconditioner).residual
        directions = [r if preconditioner is None else M @ r for r in residuals]
        quotients = [float(p @ A @ p / (p @ p)) for p in directions]
        first = next(i for i, quotient in enumerate(quotients) if quotient <= 0)
        stopped = tn.MINRES(rtol=0.0, stop_at_negative_curvature=True).solve(A, [b], preconditioner=preconditioner)
        assert stopped.status is tn.Status.NEGATIVE_CURVATURE
        assert stopped.num_iterations == first
        torch.testing.assert_close(stopped.residual[0], residuals[first])
        torch.testing.assert_close(stopped.negative_curvature[0], directions[first], rtol=1e-6, atol=1e-9)
        p = tn.MINRES(rtol=0.0, max_iterations=9).solve(A, [b], preconditioner=preconditioner).negative_curvature[0]
        assert float(p @ A @ p / (p @ p)) == pytest.approx(min(quotients[:9]), rel=1e-4)


def test_bicgstab_keeps_the_most_negative_curvature_and_goes_on():
    A, b = INDEFINITE["mixed"], random(6)
    seen = []

    class Watched:
        def __matmul__(self, v):
            seen.append(float(v[0] @ A @ v[0] / (v[0] @ v[0])))
            return [A @ v[0]]

    result = tn.BiCGSTAB(rtol=1e-9).solve(Watched(), [b])
    p = result.negative_curvature[0]
    assert result.status is tn.Status.CONVERGED
    assert float(p @ A @ p / (p @ p)) == pytest.approx(min(seen))
    assert min(seen) < 0


def test_bicgstab_breaks_down_with_a_status():
    A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    for b in ([1.0, 0.0], [1.0, 2.0]):
        result = tn.BiCGSTAB().solve(A, [torch.tensor(b, dtype=torch.float64)])
        assert result.status is tn.Status.BREAKDOWN
        assert not result.solution[0].any()


@pytest.mark.parametrize("name", [*DEFINITE, *INDEFINITE, *SINGULAR])
@pytest.mark.parametrize("preconditioned", [False, True], ids=["", "M"])
def test_steihaug_stays_inside_and_beats_the_cauchy_point(name, preconditioned):
    A = {**DEFINITE, **INDEFINITE, **SINGULAR}[name]
    n = len(A)
    b = random(n)
    M = torch.diag(torch.linspace(1, 3, n, dtype=torch.float64)) if preconditioned else None
    inverse = torch.eye(n, dtype=torch.float64) if M is None else torch.linalg.inv(M)
    for radius in (1e-3, 0.3, 2.0, 50.0):
        result = tn.SteihaugCG(radius=radius, **TIGHT).solve(A, [b], preconditioner=M)
        x = check_result(A, b, result)
        length = math.sqrt(float(x @ inverse @ x))
        assert length <= radius * (1 + 1e-9)
        if result.status in (tn.Status.BOUNDARY, tn.Status.NEGATIVE_CURVATURE):
            assert length == pytest.approx(radius, rel=1e-9)
        else:
            assert result.status is tn.Status.CONVERGED
        steepest = b if M is None else M @ b
        steepest = steepest * radius / math.sqrt(float(steepest @ inverse @ steepest))
        curvature = float(steepest @ A @ steepest)
        share = 1.0 if curvature <= 0 else min(1.0, float(b @ steepest) / curvature)
        assert quadratic(A, b, x) <= quadratic(A, b, share * steepest) * (1 - 1e-9)


def test_steihaug_with_a_start():
    A, b = INDEFINITE["mixed"], random(6)
    inside = 0.1 * random(6, 4)
    for x0, radius in ((inside, 1.0), (100 * inside, 1.0), (inside, 1e3)):
        result = tn.SteihaugCG(radius=radius).solve(A, [b], [x0])
        start = x0 * min(1.0, radius / float(x0.norm()))
        assert float(result.solution[0].norm()) <= radius * (1 + 1e-9)
        assert quadratic(A, b, result.solution[0]) <= quadratic(A, b, start) + 1e-9
    with pytest.raises(ValueError, match="x0 and preconditioner"):
        tn.SteihaugCG(radius=1.0).solve(A, [b], [inside], torch.eye(6))


@pytest.mark.parametrize("solver", [tn.CG, tn.MINRES, tn.BiCGSTAB], ids=label)
def test_stopping_rules_see_the_model(solver):
    A, b = spectrum(list(np.geomspace(0.1, 10, 12))), random(12)
    seen = []

    class Watch:
        def check(self, model, residual):
            seen.append(model[-1])

    x0 = random(12, 5)
    for k in (1, 3, 5):
        result = solver(rtol=0.0, max_iterations=k, stop=Watch()).solve(A, [b], [x0])
        assert seen[-1] == pytest.approx(quadratic(A, b, result.solution[0]) - quadratic(A, b, x0))
    assert solver(rtol=0.0, stop=tn.MaxNorm(1e-3)).solve(A, [b]).status is tn.Status.CONVERGED


@pytest.mark.parametrize("solver", [tn.CG, tn.MINRES, tn.BiCGSTAB, tn.SteihaugCG, tn.Lanczos])
def test_misuse_names_the_argument(solver):
    needed = {tn.SteihaugCG: {"radius": 1.0}, tn.Lanczos: {"num_iterations": 5}}.get(solver, {})
    with pytest.raises(ValueError, match=rf"{solver.__name__}: rtol=-1"):
        solver(**{**needed, "rtol": -1.0})
    limit = "num_iterations" if solver is tn.Lanczos else "max_iterations"
    with pytest.raises(ValueError, match=rf"{solver.__name__}: {limit}=0"):
        solver(**{**needed, limit: 0})
    for radius in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="SteihaugCG: radius="):
            tn.SteihaugCG(radius=radius)


VALUES = st.lists(st.floats(0.05, 20.0), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(VALUES, st.integers(0, 100), st.booleans())
def test_exact_after_n_steps(values, seed, indefinite):
    values = [-v if indefinite and i % 2 else v for i, v in enumerate(values)]
    A, b = spectrum(values, seed), random(len(values), seed + 1)
    solvers = [tn.MINRES(rtol=1e-9, max_iterations=len(values) + 2), tn.Lanczos(len(values), rtol=1e-8)]
    solvers += [] if indefinite else [tn.SteihaugCG(radius=1e6, rtol=1e-8, max_iterations=len(values) + 2)]
    for solver in solvers:
        result = solver.solve(A, [b])
        assert result.status is tn.Status.CONVERGED
        assert float((A @ result.solution[0] - b).norm()) <= 1e-6 * float(b.norm())


@settings(max_examples=30, deadline=None)
@given(VALUES, st.integers(0, 100), st.integers(-20, 20), st.integers(-20, 20))
def test_scaling_of_the_system_scales_the_solution(values, seed, of_A, of_b):
    A, b = spectrum([*values, -0.5], seed), random(len(values) + 1, seed)
    for solver in (tn.MINRES(), tn.BiCGSTAB(), tn.Lanczos(4)):
        one, other = solver.solve(A, [b]), solver.solve(A * 2.0**of_A, [b * 2.0**of_b])
        assert (one.status, one.num_iterations) == (other.status, other.num_iterations)
        torch.testing.assert_close(one.solution[0] * 2.0 ** (of_b - of_A), other.solution[0], rtol=1e-9, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.integers(0, 100), st.floats(1e-3, 1e3))
def test_steihaug_falls_and_grows_with_every_iteration(values, seed, radius):
    A, b = spectrum(values, seed), random(len(values), seed + 1)
    model, length = 0.0, 0.0
    for k in range(1, len(values) + 1):
        x = tn.SteihaugCG(radius=radius, rtol=1e-6, max_iterations=k).solve(A, [b]).solution[0]
        assert quadratic(A, b, x) <= model + 1e-9 * abs(model)
        assert length * (1 - 1e-7) <= float(x.norm()) <= radius * (1 + 1e-7)
        model, length = quadratic(A, b, x), float(x.norm())


@settings(max_examples=40, deadline=None)
@given(st.integers(-38, 38), st.integers(-38, 38), st.integers(-44, 30), st.integers(0, 100))
def test_overflow_is_no_exception_and_never_in_the_result(of_A, of_b, smallest, seed):
    A = spectrum([-1.0, 1.0, 2.0, 10.0**smallest], seed).mul(10.0**of_A).float()
    b = random(4, seed).mul(10.0**of_b).float()
    M = spectrum([1.0, 2.0, 10.0 ** (smallest // 2), 10.0**-20], seed + 1).float()
    for solver in [*ALL, tn.SteihaugCG(radius=1e30), tn.SteihaugCG(radius=1e-30)]:
        for matrix, preconditioner in ((A, None), (A @ A, None), (A, M)):
            assert is_finite(solver.solve(matrix, [b], preconditioner=preconditioner).solution)


SCALED = [tn.CG(), tn.SteihaugCG(radius=1e30), tn.MINRES(), tn.BiCGSTAB(), tn.Lanczos(20)]


@pytest.mark.parametrize("solver", SCALED, ids=label)
@pytest.mark.parametrize(("of_A", "of_b"), [(1.0, 1e-20), (1.0, 1e-26), (1e-23, 1.0), (1e10, 1e-18), (1.0, 1e25)])
def test_float32_systems_whose_squares_are_beyond_float32(solver, of_A, of_b):
    A, b = of_A * torch.diag(torch.logspace(0, -1, 20)), of_b * random(20).float()
    result = solver.solve(A, [b])
    assert result.status is tn.Status.CONVERGED
    assert (A.double() @ result.solution[0].double() - b.double()).norm() <= 1e-4 * b.double().norm()


@pytest.mark.parametrize("solver", [*SCALED, tn.CG(atol=1.0)], ids=label)
def test_a_right_hand_side_that_is_not_finite_is_never_solved(solver):
    b = torch.ones(3)
    b[1] = math.inf
    assert solver.solve(torch.eye(3), [b]).status is tn.Status.NOT_FINITE


@pytest.mark.parametrize("solver", SCALED, ids=label)
@pytest.mark.parametrize("started", [False, True])
def test_a_product_that_is_not_finite_counts(solver, started):
    class Counted:
        num_products = 0

        def __matmul__(self, v):
            self.num_products += 1
            return [v[0] * (torch.tensor([1.0, 2.0, 3.0]) if self.num_products < 3 else math.nan)]

    A = Counted()
    result = solver.solve(A, [torch.tensor([3.0, -2.0, 0.5])], [torch.full((3,), 0.1)] if started else None)
    assert result.status is tn.Status.NOT_FINITE
    assert result.num_products == A.num_products


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_inner_products_beyond_the_numbers_of_their_precision(size):
    x, y = [size * torch.tensor([3.0, -4.0]), torch.zeros(0)], [torch.tensor([1.0, 2.0]), torch.zeros(0)]
    assert norm(x) == pytest.approx(5 * size, rel=1e-6)
    assert dot(x, y) == pytest.approx(-5 * size, rel=1e-6)
    assert dot(y, [size * y[0], y[1]]) == pytest.approx(5 * size, rel=1e-6)
    assert dot([torch.zeros(0)], [torch.zeros(0)]) == 0 == dot(x, [torch.zeros(2), torch.zeros(0)])
    assert not math.isfinite(norm([torch.tensor([math.inf, 1.0])]))
