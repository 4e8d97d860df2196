"""What every operator can do: arithmetic, diagonal and trace, blocks, SciPy."""

from __future__ import annotations

import builtins
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, flat, like
from scipy.sparse.linalg import eigsh
from torch import Tensor
from zoo import ZOO

import torchnewton as tn
from torchnewton.curvature import Blocks, Diagonal, LinearOperator
from torchnewton.curvature.operator import Sum


class Matrix(LinearOperator):
    """A stored matrix, without a shortcut to its dense form."""

    def __init__(self, matrix: Tensor, shapes=((3,), (2, 2))) -> None:
        like = [torch.empty(s, dtype=matrix.dtype) for s in shapes]
        super().__init__(like, like, is_symmetric=bool(torch.equal(matrix, matrix.T)))
        self.matrix = matrix

    def apply(self, v):
        return like(self.domain, self.matrix @ flat(v))

    def adjoint(self, u):
        return like(self.domain, self.matrix.T @ flat(u))


def matrix(seed: int, symmetric: bool = True, size: int = 7) -> Tensor:
    A = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A + A.T if symmetric else A


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EYE = torch.eye(7, dtype=torch.float64)
ENTRIES = [torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([[3.0, 4.0], [0.5, 1.0]]).double()]


def cases() -> dict[str, tuple[LinearOperator, Tensor]]:
    M, N, S = matrix(1), matrix(2, symmetric=False), Matrix(matrix(1))
    mask = torch.zeros(7, 7)
    mask[:3, :3] = mask[3:, 3:] = 1
    tape = tn.record((p := ZOO["mlp"](torch.float64)).closure, p.params)
    found = {
        "symmetric": (S, M),
        "general": (Matrix(N), N),
        "shifted": (S + 0.5, M + 0.5 * EYE),
        "shifted from the left": (0.5 + Matrix(N), N + 0.5 * EYE),
        "shifted down": (S - 2, M - 2 * EYE),
        "scaled": (-2.0 * Matrix(N), -2 * N),
        "divided": (S / 4.0, M / 4),
        "negated": (-Matrix(N), -N),
        "sum": (S + Matrix(N), M + N),
        "difference": (S - Matrix(N), M - N),
        "built-in sum": (sum([S, Matrix(N), S]), 2 * M + N),
        "diagonal": (Diagonal(ENTRIES), torch.diag(flat(ENTRIES))),
        "with a diagonal": (0.5 * (Matrix(N) + Diagonal(ENTRIES)) + 1.0, 0.5 * (N + torch.diag(flat(ENTRIES))) + EYE),
        "blocks": (S.blocks(), M * mask),
        "blocks of a general one": (Matrix(N).blocks(), N * mask),
        "one block": ((B := Matrix(N)).blocks([B.domain]), N),
    }
    for make in (tn.GaussNewton, tn.Hessian, tn.EmpiricalFisher):
        A = make(tape)
        found[make.__name__] = (A, torch.stack([A @ e for e in torch.eye(A.shape[1], dtype=torch.float64)], dim=1))
    return found


CASES = cases()
of_each = pytest.mark.parametrize(("A", "expected"), CASES.values(), ids=CASES)


@of_each
def test_products_and_dense_matrix(A, expected):
    v, M = random(len(expected)), random(len(expected), 3, seed=1)
    assert_close(A @ v, expected @ v)
    assert_close(flat(A @ like(A.domain, v)), expected @ v)
    assert_close(A @ M, expected @ M)
    assert (A @ M[:, :0]).shape == (len(expected), 0)
    assert_close(A.to_dense(), expected)
    assert_close(flat(A.adjoint(like(A.domain, v))), expected.T @ v)
    if A.is_symmetric:
        assert_close(expected, expected.T)
    if A.is_positive_semidefinite:
        assert torch.linalg.eigvalsh(expected)[0] > -1e-12


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(CASES)), st.integers(0, 2**31), st.floats(-10, 10))
def test_linear_with_its_adjoint(name, seed, factor):
    A, expected = CASES[name]
    u, v = random(len(expected), seed=seed), random(len(expected), seed=seed + 1)
    Av, Atu = A @ v, flat(A.adjoint(like(A.domain, u)))
    scale = expected.norm() * u.norm() * v.norm()
    assert abs(u @ Av - Atu @ v) <= 1e-12 * scale
    assert (A @ (u + factor * v) - A @ u - factor * Av).norm() <= 1e-12 * (1 + abs(factor)) * scale


@of_each
def test_exact_diagonal_and_trace(A, expected):
    found = A.diagonal()
    assert [x.shape for x in found.value] == [x.shape for x in A.domain]
    assert_close(flat(found.value), expected.diagonal())
    assert not flat(found.standard_error).any()
    trace = A.trace()
    assert abs(trace.value - expected.trace()) <= 1e-10 * expected.norm()
    assert trace.standard_error == 0


@of_each
def test_estimates_lie_within_their_errors(A, expected):
    """At most 5 standard errors from the truth; the error is no more than 3 times the one that theory gives."""
    m = 60
    found = A.diagonal(m, generator())
    value, error = flat(found.value), flat(found.standard_error)
    assert ((value - expected.diagonal()).abs() <= 5 * error + 1e-12).all()
    if not isinstance(A, (Blocks, Sum)):  # the one takes products with all of A, the other samples both separately
        theory = (expected - torch.diag(expected.diagonal())).square().sum(1).div(m).sqrt()
        assert (error <= 3 * theory + 1e-12).all()
    trace = A.trace(m, generator())
    assert abs(trace.value - expected.trace()) <= 5 * trace.standard_error + 1e-9 * expected.norm()
    again = A.trace(m, generator())
    assert again == trace


def test_estimates_are_unbiased_and_the_error_is_theirs():
    M = matrix(3, size=40)
    A = Matrix(M, shapes=((40,),))
    diagonals, traces, errors = [], [], []
    g = generator(1)
    for _ in range(300):
        found = A.diagonal(4, g)
        diagonals.append(found.value[0])
        trace = A.trace(5, g)
        traces.append(trace.value)
        errors.append(trace.standard_error**2)
    deviation = torch.stack(diagonals).mean(0) - M.diagonal()
    assert (deviation.abs() <= 5 * torch.stack(diagonals).std(0) / math.sqrt(300)).all()
    found = torch.tensor(traces)
    assert abs(found.mean() - M.trace()) <= 5 * found.std() / math.sqrt(300)
    assert abs(torch.tensor(errors).mean().sqrt() / found.std() - 1) < 0.2


def test_trace_of_low_rank_is_exact_after_a_few_products():
    """The sketch of Hutch++ spans the range."""
    B = random(200, 3)
    A = Matrix(B @ B.T, shapes=((200,),))
    trace = A.trace(20, generator())
    assert abs(trace.value / float(B.square().sum()) - 1) < 1e-12
    assert trace.standard_error <= 1e-12 * trace.value


def test_large_operators_are_estimated_and_closed_forms_are_not():
    size = 1200
    A = Matrix(torch.diag(torch.arange(size, dtype=torch.float64)) + 0.01 * random(size, size), shapes=((size,),))
    assert A.trace().standard_error > 0
    assert A.diagonal().standard_error[0].max() > 0
    D = Diagonal([torch.arange(size, dtype=torch.float64)])
    assert D.trace() == tn.Estimate(size * (size - 1) / 2, 0.0)
    mixed = (A + D).diagonal(generator=generator())
    alone = A.diagonal(generator=generator())
    assert torch.equal(mixed.standard_error[0], alone.standard_error[0])


class _Known(Matrix):
    def _exact_diagonal(self):
        return like(self.domain, self.matrix.diagonal())


def test_a_closed_form_is_taken():
    size = 1200
    A = _Known(random(size, size), shapes=((size,),))
    assert_close((2.0 * A + 1.0).diagonal().value[0], 2 * A.matrix.diagonal() + 1)
    assert A.trace().standard_error == 0
    assert A.trace(5, generator()).standard_error > 0


@pytest.mark.parametrize("name", ["diagonal", "trace"])
def test_misuse_of_estimates(name):
    A = CASES["symmetric"][0]
    with pytest.raises(ValueError, match="num_samples=1"):
        getattr(A, name)(1)
    J = tn.Jacobian(tn.record((p := ZOO["mlp"](torch.float64)).closure, p.params))
    with pytest.raises(ValueError, match="square"):
        getattr(J, name)()


def test_misuse_of_arithmetic():
    A = CASES["symmetric"][0]
    J = tn.Jacobian(tn.record((p := ZOO["mlp"](torch.float64)).closure, p.params))
    with pytest.raises(ValueError, match="square"):
        J + 1.0
    with pytest.raises(ValueError, match="shape"):
        A @ torch.zeros(3, 3)
    with pytest.raises(ValueError, match="differ"):
        A - Diagonal([torch.ones(3)])
    with pytest.raises(NotImplementedError, match="transpose"):
        LinearOperator.adjoint(CASES["general"][0], [])


@pytest.mark.parametrize("name", ["mlp", "tied-weights", "two-losses", "frozen-and-unused"])
@pytest.mark.parametrize("make", [tn.GaussNewton, tn.Hessian, tn.EmpiricalFisher])
def test_blocks_of_curvature(name, make):
    p = ZOO[name](torch.float64)
    A = make(tn.record(p.closure, p.params))
    groups = [p.params[::2], p.params[1::2]]
    owner = torch.cat([torch.full((q.numel(),), i % 2) for i, q in enumerate(p.params)])
    expected = A.to_dense() * (owner[:, None] == owner)
    B = A.blocks(groups)
    v = random(len(owner))
    assert_close(B @ v, expected @ v)
    assert_close(B.to_dense(), expected)
    assert_close(flat(B.diagonal().value), expected.diagonal())
    assert B.trace().value == A.trace().value
    assert B.is_symmetric
    assert B.is_positive_semidefinite == A.is_positive_semidefinite


def test_the_quadratic_form_of_a_sum_is_the_sum():
    """By the shorter way of each: half a product a direction for G, a whole one for the matrix beside it."""
    p = ZOO["mlp"](torch.float64)
    G = tn.GaussNewton(tn.record(p.closure, p.params))
    D = [like(p.params, random(G.shape[0], seed=seed)) for seed in range(3)]
    A = G + Diagonal([x.abs() + 1 for x in D[0]])
    form, num_products = A.quadratic_form(D)
    flat_D = torch.stack([flat(d) for d in D])
    assert_close(form, flat_D @ A.to_dense() @ flat_D.T)
    assert num_products == 1.5 + 3


def test_blocks_cost_and_cover_what_their_products_do():
    """One product with the blocks takes one with the Hessian for each of them."""
    p = ZOO["mlp"](torch.float64)
    H = tn.Hessian(tn.record(p.closure, p.params))
    blocks = H.blocks()
    assert blocks.covers_whole_loss
    assert blocks.gradients_per_product == len(p.params) * H.gradients_per_product
    assert (blocks.path, blocks.can_factor()) == (H.path, H.can_factor())


def test_misuse_of_blocks():
    A = CASES["symmetric"][0]
    with pytest.raises(ValueError, match="none of A's parameters"):
        A.blocks([[torch.zeros(3)], [A.domain[1]]])
    with pytest.raises(ValueError, match="one group"):
        A.blocks([[A.domain[0]]])
    with pytest.raises(ValueError, match="one group"):
        A.blocks([[A.domain[0]], A.domain])


@of_each
def test_scipy_products(A, expected):
    S = A.to_scipy()
    v, M = random(len(expected)).numpy(), random(len(expected), 3).numpy()
    assert S.shape == tuple(expected.shape)
    assert S.dtype == v.dtype
    assert_close(torch.from_numpy(S @ v), expected @ torch.from_numpy(v))
    assert_close(torch.from_numpy(S.T @ v), expected.T @ torch.from_numpy(v))
    assert_close(torch.from_numpy(S @ M), expected @ torch.from_numpy(M))


def test_scipy_finds_eigenvalues():
    p = ZOO["mlp"](torch.float64)
    for make in (tn.GaussNewton, tn.Hessian):
        A = make(tn.record(p.closure, p.params))
        found = eigsh(A.to_scipy(), k=3, which="LA", return_eigenvectors=False)
        assert_close(torch.from_numpy(found).sort().values, torch.linalg.eigvalsh(A.to_dense())[-3:])


def test_scipy_of_rectangular_and_low_precision():
    p = ZOO["mlp"](torch.float64)
    J = tn.Jacobian(tn.record(p.closure, p.params))
    u = random(J.shape[0])
    assert_close(torch.from_numpy(J.to_scipy().rmatvec(u.numpy())), J.to_dense().T @ u)
    half = Diagonal([torch.tensor([1.0, 2.0], dtype=torch.bfloat16)]).to_scipy()
    assert half.dtype == "float32"
    assert (half @ [1.0, 1.0]).tolist() == [1.0, 2.0]


def test_without_scipy(monkeypatch):
    def missing(name: str):
        raise builtins.ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"torchnewton\[scipy\]"):
        CASES["symmetric"][0].to_scipy()


def test_solvers_take_sums_of_curvatures():
    p = ZOO["mlp"](torch.float64)
    tape = tn.record(p.closure, p.params)
    A = 0.5 * tn.GaussNewton(tape) + 0.5 * tn.EmpiricalFisher(tape) + 0.1
    result = tn.CG(rtol=1e-10, max_iterations=200).solve(A, tape.gradient)
    assert_close(flat(result.solution), torch.linalg.solve(A.to_dense(), flat(tape.gradient)), 1e-8)
    assert_close(F.relu(flat(A.diagonal().value)), A.to_dense().diagonal())
