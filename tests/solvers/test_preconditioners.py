"""Jacobi, blocks and randomized Nyström: against dense inverses, and by the iterations they save."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import DEFINITE, SHAPES, OnLists, random, spectrum

import torchnewton as tn
from torchnewton.vectors import flatten, unflatten

DECAY = spectrum(list(np.geomspace(1e-8, 1e3, 80)))


def dense(M, size):
    """The matrix, by products with flat tensors."""
    return torch.stack([M @ column for column in torch.eye(size, dtype=torch.float64)], dim=1)


def made(A, like, damping):
    """All preconditioners of a 17×17 matrix."""
    parts = [x.numel() for x in like]
    blocks = [A[s : s + n, s : s + n] for s, n in zip(np.cumsum([0, *parts]), parts, strict=False)]
    return {
        "Jacobi": tn.Jacobi(unflatten(A.diagonal(), like), damping),
        "BlockDiagonal": tn.BlockDiagonal(blocks, damping),
        "Nystrom": tn.Nystrom.sketch(OnLists(A, SHAPES), like, 5, damping),
    }


@pytest.mark.parametrize("name", ["Jacobi", "BlockDiagonal", "Nystrom"])
def test_are_symmetric_positive_definite_on_lists_and_flat(name):
    A = DEFINITE["seventeen"]
    like = OnLists(A, SHAPES).like
    M = made(A, like, 0.5)[name]
    matrix = dense(M, 17)
    torch.testing.assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
    v = random(17)
    listed = M @ unflatten(v, like)
    assert [x.shape for x in listed] == [x.shape for x in like]
    torch.testing.assert_close(flatten(listed), M @ v)
    for solver in (
        tn.CG(rtol=1e-9),
        tn.MINRES(rtol=1e-9),
        tn.BiCGSTAB(rtol=1e-9),
        tn.SteihaugCG(rtol=1e-9, radius=9e9),
    ):
        result = solver.solve(OnLists(A, SHAPES), unflatten(v, like), preconditioner=M)
        assert result.status is tn.Status.CONVERGED
        torch.testing.assert_close(flatten(result.solution), torch.linalg.solve(A, v), rtol=1e-6, atol=1e-8)


def test_jacobi_and_blocks_are_the_inverses_they_say():
    A = DEFINITE["seventeen"]
    like = OnLists(A, SHAPES).like
    eye = torch.eye(17, dtype=torch.float64)
    M = tn.Jacobi(unflatten(A.diagonal(), like), 0.5, exponent=0.75)
    torch.testing.assert_close(dense(M, 17), torch.diag((A.diagonal() + 0.5) ** -0.75))
    position = torch.repeat_interleave(torch.arange(5), torch.tensor([x.numel() for x in like]))
    inside = position[:, None] == position
    blocks = made(A, like, 0.5)["BlockDiagonal"]
    torch.testing.assert_close(dense(blocks, 17), torch.linalg.inv(A * inside + 0.5 * eye))


def test_misuse_and_numbers_that_are_not_finite():
    with pytest.raises(ValueError, match=r"raise damping=1\.0"):
        tn.Jacobi([torch.tensor([1.0, -2.0])], damping=1.0)
    with pytest.raises(ValueError, match=r"block 1 .* damping=0\.5"):
        tn.BlockDiagonal([torch.eye(2), -torch.eye(2)], damping=0.5)
    with pytest.raises(ValueError, match=r"damping=0\.0 must be positive"):
        tn.Nystrom.sketch(torch.diag(torch.tensor([1.0, 0.0, 0.0])), [torch.zeros(3)], 2, 0.0)
    with pytest.raises(ValueError, match="rank=4"):
        tn.Nystrom.sketch(torch.eye(3), [torch.zeros(3)], 4, 1.0, max_rank=3)
    bad = torch.full((3, 3), math.nan)
    for M in (tn.Jacobi([bad[0]], 1.0), tn.BlockDiagonal([bad], 1.0)):
        result = tn.CG().solve(torch.eye(3), [torch.ones(3)], preconditioner=M)
        assert result.status is tn.Status.NOT_FINITE
        assert not result.solution[0].any()
    M = tn.Nystrom.sketch(bad, [torch.zeros(3)], 2, 4.0)
    torch.testing.assert_close(M @ torch.ones(3), 0.25 * torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [3, 5, 17])
def test_nystrom_of_low_rank_is_exact(rank, dtype):
    A = spectrum([100.0, 10.0, 1.0] + [0.0] * 14)
    operator = OnLists(A.to(dtype), SHAPES)
    M = tn.Nystrom.sketch(operator, operator.like, rank, 0.1)
    precision = 1e-9 if dtype is torch.float64 else 1e-4
    expected = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(M.eigenvalues[:3].double(), expected, rtol=precision, atol=100 * precision)
    assert float(M.eigenvalues[3:].sum()) <= 100 * precision
    eye = torch.eye(17, dtype=torch.float64)
    for damping, preconditioner in ((0.1, M), (7.0, M.at(7.0))) if rank > 3 else ():
        matrix = torch.stack([preconditioner @ column for column in eye.to(dtype)], dim=1)
        inverse = torch.linalg.inv(A + damping * eye)
        torch.testing.assert_close(matrix.double(), inverse, rtol=precision, atol=10 * precision)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
def test_nystrom_meets_the_bound_of_its_condition_number_and_saves_iterations(damping):
    eye, b = torch.eye(80, dtype=torch.float64), random(80)
    counts = [tn.CG(rtol=1e-8, max_iterations=9999).solve(A=DECAY + damping * eye, b=[b]).num_iterations]
    for rank in (10, 30, 60):
        M = tn.Nystrom.sketch(DECAY, [b], rank, damping)
        U = M.basis[0].T
        error = float(torch.linalg.matrix_norm(DECAY - U @ torch.diag(M.eigenvalues) @ U.T, 2))
        root = torch.linalg.cholesky(dense(M, 80))
        values = torch.linalg.eigvalsh(root.T @ (DECAY + damping * eye) @ root)
        bound = (float(M.eigenvalues[-1]) + damping + error) / damping
        assert float(values[-1] / values[0]) <= bound * (1 + 1e-6)
        result = tn.CG(rtol=1e-8, max_iterations=9999).solve(DECAY + damping * eye, [b], preconditioner=M)
        counts.append(result.num_iterations)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] <= counts[0] / 4


def test_nystrom_doubles_its_rank_until_the_error_is_small():
    b, products = random(80), []

    class Counted:
        def __matmul__(self, v):
            products.append(v)
            return [DECAY @ v[0]]

    for damping in (1e1, 1e-1, 1e-3):
        products.clear()
        M = tn.Nystrom.sketch(Counted(), [b], 4, damping, max_rank=80)
        U = M.basis[0].T
        error = float(torch.linalg.matrix_norm(DECAY - U @ torch.diag(M.eigenvalues) @ U.T, 2))
        assert M.error <= 10 * damping
        assert 0.3 * error <= M.error <= error * (1 + 1e-9)
        rank = len(M.eigenvalues)
        doublings = round(math.log2(rank / 4))
        assert rank == 4 * 2**doublings
        assert len(products) == rank + 10 * (doublings + 1)
    assert rank > 16
    limited = tn.Nystrom.sketch(DECAY, [b], 4, 1e-9, max_rank=10)
    assert len(limited.eigenvalues) == 10
    assert limited.error > 1e-8


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=10), st.integers(1, 12), st.integers(0, 50))
def test_nystrom_is_below_the_matrix(values, rank, seed):
    A = spectrum(values, seed)
    M = tn.Nystrom.sketch(A, [random(len(values))], rank, 1.0, torch.Generator().manual_seed(seed))
    U = M.basis[0].T
    gap = A - U @ torch.diag(M.eigenvalues) @ U.T
    assert float(torch.linalg.eigvalsh(gap)[0]) >= -1e-9 * (1 + max(values))
    torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64), rtol=0, atol=1e-9)
