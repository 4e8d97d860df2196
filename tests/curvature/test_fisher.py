"""`EmpiricalFisher` against outer products of per-sample gradients, one backward pass each."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, derivative, flat
from torch import Tensor, nn
from zoo import ZOO, Problem, integers, uniform
from zoo.losses import LOSSES
from zoo.networks import NETWORKS

import torchnewton as tn

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # of kl_div

MIXED = {"autocast": 0.05}


def recorded(name: str) -> tuple[Problem, tn.Tape]:
    p = ZOO[name](torch.float64)
    torch.manual_seed(0)
    return p, tn.record(p.closure, p.params)


def random(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fisher_of_scores(params: list[Tensor], z: Tensor, scores: list[Tensor]) -> Tensor:
    """Σₙ sₙsₙᵀ, sₙ = Jᵀ(∂score/∂z restricted to sample n): one score ℓ-scalar for each sample."""
    total = torch.zeros(sum(p.numel() for p in params), sum(p.numel() for p in params), dtype=torch.float64)
    for n, score in enumerate(scores):
        (slope,) = torch.autograd.grad(score, z, retain_graph=True)
        mask = torch.zeros_like(z)
        mask[n if len(scores) > 1 else slice(None)] = 1
        s = derivative((z * (slope * mask)).sum(), params)
        total += s.outer(s)
    return total


def scores_of_entries(entries: Tensor, weights: Tensor) -> list[Tensor]:
    """Σ √wᵢ ℓᵢ over the entries of each sample, the first dimension."""
    products = entries * weights.sqrt()
    return [products.sum()] if products.dim() == 0 else [part.sum() for part in products]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, reduction):
    """The weight of an entry is the ratio of the loss to the sum of its entries."""
    if reduction == "batchmean" and "kl_div" not in name:
        return
    key = f"{name}-{reduction}"
    if key not in ZOO:
        return
    p, tape = recorded(key)
    (z,) = p.outputs()
    entries = LOSSES[name][1](z, "none")
    if reduction == "none":
        w = torch.linspace(0.5, 1.5, entries.numel(), dtype=z.dtype).view_as(entries)
        weights = w / w.sum()
    else:
        weights = (p.loss(z) / entries.sum()).detach().expand_as(entries)
    expected = fisher_of_scores(p.params, z, scores_of_entries(entries, weights))
    A = tn.EmpiricalFisher(tape)
    v = random(A.shape[1], 0)
    assert expected.norm() > 0
    assert_close(A @ v, expected @ v)
    assert_close(A.to_dense(), expected)
    if A.can_factor():
        R, shift = A.factored()
        assert shift == 0
        assert_close(R.rows().T @ R.rows(), expected)
    assert A.is_symmetric
    assert A.is_positive_semidefinite


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name):
    p, tape = recorded(name)
    A = tn.EmpiricalFisher(tape)
    p = ZOO[name](torch.float64)  # anew, for buffers that a run moves
    torch.manual_seed(0)
    (z,) = p.outputs()
    (u,) = torch.autograd.grad(p.loss(z), z, retain_graph=True)
    n = z.shape[0] if z.dim() > 1 else 1
    count = z.numel() / (z.shape[1] if z.dim() > 1 else z.shape[0])
    scores = [count**0.5 * (z * u)[i if n > 1 else slice(None)].sum() for i in range(n)]
    expected = fisher_of_scores(p.params, z, scores)
    v = random(A.shape[1], 0)
    rtol = MIXED.get(name, 1e-10)
    assert_close(A @ v, expected @ v, rtol)
    assert_close(A.to_dense(), expected, rtol)
    assert_close(flat(A.diagonal().value), expected.diagonal(), rtol)


X, Y, T = uniform(5, 3).double(), integers(3, 5), uniform(5, 2, seed=5).double()


def _model(width: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width)).double()


def per_sample(model: nn.Module, loss, n: int = 5) -> Tensor:
    """The rows ∇ℓₙ, one backward pass each."""
    return torch.stack([derivative(loss(model(X[i : i + 1]), i), list(model.parameters())) for i in range(n)])


def fisher(model: nn.Module, closure, **options) -> tn.EmpiricalFisher:
    return tn.EmpiricalFisher(tn.record(closure, list(model.parameters())), **options)


def cross_entropy(z: Tensor, i: int) -> Tensor:
    return F.cross_entropy(z, Y[i : i + 1])


def test_mean_and_sum_by_hand():
    model = _model()
    G = per_sample(model, cross_entropy)
    mean = fisher(model, lambda: F.cross_entropy(model(X), Y))
    assert_close(mean.to_dense(), G.T @ G / 5)
    assert_close(fisher(model, lambda: F.cross_entropy(model(X), Y, reduction="sum")).to_dense(), G.T @ G)
    assert_close(fisher(model, lambda: 0.3 * F.cross_entropy(model(X), Y)).to_dense(), 0.3 * G.T @ G / 5)
    by_hand = fisher(model, lambda: F.cross_entropy(model(X), Y, reduction="none").mean())
    assert_close(by_hand.to_dense(), mean.to_dense())


def test_ignored_samples_and_class_weights():
    model = _model()
    labels, weight = torch.tensor([0, -100, 2, 1, -100]), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    w = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    rows = w[:, None] * per_sample(model, lambda z, i: F.cross_entropy(z, labels[i : i + 1].clamp(min=0)))
    found = fisher(model, lambda: F.cross_entropy(model(X), labels, weight))
    assert_close(found.to_dense(), rows.T @ rows / w.sum())


def test_squared_error_has_the_convention_of_curvlinops():
    """mean divides by all N·C entries; ℓₙ is the squared length of the residual."""
    model = _model(2)
    G = per_sample(model, lambda z, i: F.mse_loss(z, T[i : i + 1], reduction="sum"))
    assert_close(fisher(model, lambda: F.mse_loss(model(X), T)).to_dense(), G.T @ G / 10)
    assert_close(fisher(model, lambda: F.mse_loss(model(X), T, reduction="sum")).to_dense(), G.T @ G)
    w = uniform(5, 2, low=0.5, high=2.0).double()
    weighted = per_sample(model, lambda z, i: (w[i : i + 1] * (z - T[i : i + 1]) ** 2).sum())
    assert_close(fisher(model, lambda: F.mse_loss(model(X), T, weight=w)).to_dense(), weighted.T @ weighted / w.sum())


def test_weights_of_samples_in_front_of_losses():
    model, w = _model(), torch.tensor([0.1, 0.0, 0.4, 2.0, 1.0], dtype=torch.float64)
    G = per_sample(model, cross_entropy)
    found = fisher(model, lambda: w @ F.cross_entropy(model(X), Y, reduction="none"))
    assert_close(found.to_dense(), G.T @ (w[:, None] * G))


def test_several_losses_and_backward_calls_add_up():
    model = _model()
    C = per_sample(model, cross_entropy)
    M = per_sample(model, lambda z, i: z.square().sum())
    expected = 0.7 * C.T @ C / 5 - 0.1 * M.T @ M

    def both() -> Tensor:
        z = model(X)
        return 0.7 * F.cross_entropy(z, Y) - 0.1 * F.mse_loss(z, torch.zeros_like(z), reduction="sum")

    A = fisher(model, both)
    assert not A.is_positive_semidefinite
    assert A.factored() is None
    assert_close(A.to_dense(), expected)
    assert_close(A @ random(len(expected), 0), expected @ random(len(expected), 0))
    assert_close(flat(A.diagonal().value), expected.diagonal())

    def accumulated() -> None:
        for part in (slice(0, 3), slice(3, 5)):
            F.cross_entropy(model(X[part]), Y[part], reduction="sum").backward()

    assert_close(fisher(model, accumulated).to_dense(), C.T @ C)


def test_both_arguments_of_a_loss():
    model = _model(4)
    rows = per_sample(model, lambda z, i: F.mse_loss(z[:, :2], z[:, 2:], reduction="sum"))

    def closure() -> Tensor:
        z = model(X)
        return F.mse_loss(z[:, :2], z[:, 2:])

    A = fisher(model, closure)
    assert_close(A.to_dense(), rows.T @ rows / 10)


def test_marked_outputs_state_their_reduction():
    model = _model(2)

    def closure(combine) -> Tensor:
        return combine(torch.log(torch.cosh(tn.outputs(model(X)) - T)).sum(1))

    G = per_sample(model, lambda z, i: torch.log(torch.cosh(z - T[i : i + 1])).sum())
    assert_close(fisher(model, partial(closure, torch.mean), reduction="mean").to_dense(), G.T @ G / 5)
    assert_close(fisher(model, partial(closure, torch.sum), reduction="sum").to_dense(), G.T @ G)
    with pytest.raises(ValueError, match="reduction="):
        fisher(model, partial(closure, torch.mean))


def test_equals_gauss_newton_on_average_over_the_model():
    """Enumerate the labels of one sample, weighted by their probabilities."""
    model = _model()
    x = X[:1]
    p = model(x).detach().softmax(1)[0]
    average = sum(
        p[c] * fisher(model, lambda c=c: F.cross_entropy(model(x), torch.tensor([c]))).to_dense() for c in range(3)
    )
    params = list(model.parameters())
    G = tn.GaussNewton(tn.record(lambda: F.cross_entropy(model(x), Y[:1]), params))
    assert_close(average, G.to_dense())


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([n for n in ZOO if n not in MIXED]), st.integers(0, 2**31), st.floats(-10, 10))
def test_linear_symmetric_and_positive_semidefinite(name, seed, factor):
    p, tape = recorded(name)
    A = tn.EmpiricalFisher(tape, reduction="mean")
    u, v = random(A.shape[0], seed), random(A.shape[0], seed + 1)
    Au, Av = A @ u, A @ v
    scale, rtol = Au.norm() * v.norm() + Av.norm() * u.norm(), 10 * p.rtol
    assert abs(u @ Av - v @ Au) <= rtol * scale
    assert u @ Au >= -rtol * scale
    assert (A @ (u + factor * v) - Au - factor * Av).norm() <= rtol * (Au.norm() + abs(factor) * Av.norm())


def test_its_products_cost_what_those_of_its_jacobian_do():
    p = ZOO["mlp"](torch.float64)
    tape = tn.record(p.closure, p.params)
    for jacobian in (tn.Jacobian(tape), tn.LayerJacobian(tape), tn.DifferenceJacobian(tape)):
        assert tn.EmpiricalFisher(tape, jacobian).gradients_per_product == jacobian.gradients_per_product


def test_misuse():
    model = _model()
    params = list(model.parameters())
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="both signs"):
        fisher(model, lambda: signs @ F.cross_entropy(model(X), Y, reduction="none"))
    with pytest.raises(ValueError, match="reduction='none'"):
        fisher(model, lambda: F.cross_entropy(model(X), Y), reduction="none")
    with pytest.raises(tn.RecordError, match="no split"):
        tn.EmpiricalFisher(tn.record(lambda: model(X).abs().sum(), params))
    with pytest.raises(ValueError, match='reduction="mean"'):
        tn.EmpiricalFisher(tn.record(lambda: model(X).square().sum(), params))


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_outputs_with_different_numbers_of_samples():
    model = _model(2)
    with pytest.raises(ValueError, match="different numbers of samples"):
        fisher(model, lambda: F.mse_loss(model(X), model(X[:1])))


def test_natural_gradient_step():
    """`Newton` takes the empirical Fisher as any other curvature."""
    model = _model()
    optimizer = tn.Newton(model.parameters(), curvature=tn.EmpiricalFisher)
    first = optimizer.step(lambda: F.cross_entropy(model(X), Y))
    for _ in range(10):
        last = optimizer.step(lambda: F.cross_entropy(model(X), Y))
    assert last < 0.5 * first
