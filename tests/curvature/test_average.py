"""`Average`: one fixed matrix from many closures, with the memory of one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, derivative, flat, like
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import integers, uniform

import torchnewton as tn
from torchnewton.curvature import Diagonal

X, Y = uniform(10, 3).double(), integers(3, 10)
CURVATURES = [tn.GaussNewton, tn.Hessian, tn.EmpiricalFisher]


def _model(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), *extra, nn.Tanh(), nn.Linear(4, 3)).double()


def _loss(model: nn.Module):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def _closures(model: nn.Module, sizes=(4, 4, 2)):
    return [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in zip(X.split(sizes), Y.split(sizes), strict=True)]


def random(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_mean_of_closures(curvature):
    model = _model()
    params, closures = list(model.parameters()), _closures(model)
    for weights in (None, [1.0, 2.0, 0.5], torch.tensor([1.0, 2.0, 0.5])):
        A = tn.Average(closures, params, curvature=curvature, weights=weights)
        w = torch.tensor([1.0, 1.0, 1.0] if weights is None else [1.0, 2.0, 0.5], dtype=torch.float64)
        w /= w.sum()
        tapes = [tn.record(c, params) for c in closures]
        expected = sum(a * curvature(t).to_dense() for a, t in zip(w, tapes, strict=True))
        v = random(len(expected), 0)
        assert_close(A @ v, expected @ v)
        assert_close(A @ torch.stack([v, 2 * v], dim=1), expected @ torch.stack([v, 2 * v], dim=1))
        assert_close(flat(A.adjoint(like(params, v))), expected @ v)
        assert_close(A.to_dense(), expected)
        assert_close(flat(A.diagonal().value), expected.diagonal())
        assert_close(A.loss, sum(a * t.loss for a, t in zip(w, tapes, strict=True)))
        assert_close(flat(A.gradient), sum(a * flat(t.gradient) for a, t in zip(w, tapes, strict=True)))
        assert A.is_symmetric
        assert A.is_positive_semidefinite == curvature(tapes[0]).is_positive_semidefinite


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_short_last_batch_counts_by_its_samples(curvature, shuffle):
    model = _model()
    params = list(model.parameters())
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=shuffle)
    A = tn.Average(loader, params, _loss(model), curvature=curvature)
    tape = tn.record(lambda: F.cross_entropy(model(X), Y), params)
    assert A.total_weight == 10
    assert_close(A.loss, tape.loss)
    assert_close(flat(A.gradient), flat(tape.gradient))
    assert_close(A.to_dense(), curvature(tape).to_dense())
    v = random(A.shape[1], 0)
    assert_close(A @ v, curvature(tape) @ v)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_live_tapes_outlive_products(curvature, training):
    """Buffers are put back without telling autograd that they were written to."""
    model = _model(nn.BatchNorm1d(4)).train(training)
    params = list(model.parameters())
    tape = tn.record(lambda: F.cross_entropy(model(X), Y), params)
    statistics = [b.clone() for b in model.buffers()]
    A = tn.Average(_closures(model), params, curvature=curvature)
    B = curvature(tape)
    v = random(B.shape[1], 0)
    expected = B @ v
    y = A @ v
    assert_close(B @ v, expected)
    assert_close((A + B) @ v, y + expected)
    assert_close(B.to_dense() @ v, expected)
    assert all(torch.equal(b, s) for b, s in zip(model.buffers(), statistics, strict=True))


def test_batches_of_any_structure():
    model = _model()
    params = list(model.parameters())
    full = tn.GaussNewton(tn.record(lambda: F.cross_entropy(model(X), Y), params)).to_dense()
    nested = [{"id": "a", "data": [x], "y": y} for x, y in zip(X.split(6), Y.split(6), strict=True)]
    A = tn.Average(nested, params, lambda b: F.cross_entropy(model(b["data"][0]), b["y"]))
    assert_close(A.to_dense(), full)
    ranges = [range(6), range(6, 10)]
    B = tn.Average(ranges, params, lambda r: F.cross_entropy(model(X[list(r)]), Y[list(r)]), weights=len)
    assert_close(B.to_dense(), full)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_fixed_symmetric_matrix_under_dropout_and_batchnorm(curvature):
    """Masks repeat, statistics stay; random numbers go on as if there had been no product."""
    model = _model(nn.BatchNorm1d(4), nn.Dropout(0.5))
    params = list(model.parameters())
    statistics = [b.clone() for b in model.buffers()]
    A = tn.Average(
        DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True), params, _loss(model), curvature=curvature
    )
    state = torch.get_rng_state()
    for p in params:
        p.grad = torch.ones_like(p)
    u, v = random(A.shape[0], 0), random(A.shape[0], 1)
    Au, Av = A @ u, A @ v
    assert abs(u @ Av - v @ Au) <= 1e-12 * Au.norm() * v.norm()
    assert torch.equal(A @ u, Au)
    assert_close(A @ (u + 2 * v), Au + 2 * Av, 1e-12)
    assert_close(A.to_dense() @ u, Au)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, s) for b, s in zip(model.buffers(), statistics, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params)


def test_the_second_matrix_has_other_masks():
    """Making one draws as one run does."""
    model = _model(nn.Dropout(0.5))
    closures = _closures(model)
    first, second = (tn.Average(closures, list(model.parameters())) for _ in range(2))
    assert float(first.loss) != float(second.loss)


def test_closures_that_call_backward():
    model = _model()
    params = list(model.parameters())

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    A = tn.Average([closure], params)
    assert all(p.grad is None for p in params)
    assert_close(flat(A.gradient), derivative(F.cross_entropy(model(X), Y), params))


class Token:
    """Lives as long as the node of the graph that holds it."""


def test_no_graph_survives():
    """Each graph is gone before the next closure is recorded, without the garbage collector; a replay meets one."""
    model = _model()
    alive: list[weakref.ref] = []
    most = 0

    def closure() -> Tensor:
        nonlocal most
        z = model(X)
        most = max(most, sum(r() is not None for r in alive))
        z.grad_fn.metadata["token"] = token = Token()
        alive.append(weakref.ref(token))
        return F.cross_entropy(z, Y)

    gc.collect()
    gc.disable()
    try:
        for curvature in CURVATURES:
            A = tn.Average([closure] * 4, list(model.parameters()), curvature=curvature)
            A @ random(A.shape[1], 0)
            A.to_dense()
    finally:
        gc.enable()
    assert len(alive) >= 36
    assert most <= 1
    assert all(r() is None for r in alive)


def test_parameters_that_have_moved():
    model = _model()
    A = tn.Average(_closures(model), list(model.parameters()))
    with torch.no_grad():
        model[0].weight += 0.1
    with pytest.raises(tn.RecordError, match="anew"):
        A @ torch.zeros(A.shape[1])


def test_misuse():
    model = _model()
    params, closures = list(model.parameters()), _closures(model)
    for arguments, options, message in (
        ((iter(closures), params), {}, "iterator"),
        ((closures, []), {}, "params"),
        (([], params), {}, "no batch"),
        (([X], params), {}, "loss_of_batch"),
        ((closures, params), {"weights": [1.0]}, "weights"),
        ((closures, params), {"weights": [1.0] * 4}, "more entries"),
        ((closures, params), {"weights": [1.0, -1.0, 1.0]}, "weights"),
        ((closures, params), {"weights": [0.0] * 3}, "above 0"),
        ((closures, params), {"curvature": tn.Jacobian}, "square"),
        (([range(3)], params, lambda r: F.cross_entropy(model(X), Y)), {}, "weights=lambda"),
    ):
        with pytest.raises(ValueError, match=message):
            tn.Average(*arguments, **options)


def test_solvers_take_an_average():
    model = _model()
    params = list(model.parameters())
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    A = tn.Average(loader, params, _loss(model)) + Diagonal([torch.full_like(p, 0.1) for p in params])
    expected = torch.linalg.solve(A.to_dense(), flat(tape_gradient(model)))
    for solver in (tn.CG(rtol=1e-10, max_iterations=200), tn.Direct()):
        assert_close(flat(solver.solve(A, tape_gradient(model)).solution), expected, 1e-8)


def tape_gradient(model: nn.Module) -> list[Tensor]:
    return tn.record(lambda: F.cross_entropy(model(X), Y), list(model.parameters())).gradient
