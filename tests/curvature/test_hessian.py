"""`Hessian` against rows of plain autograd and against torch.func on models that the library never sees."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, derivative, flat, like
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import ZOO, Problem, integers, uniform
from zoo.losses import LOSSES

import torchnewton as tn

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # of kl_div

CALLS_BACKWARD = ("accumulated", "two-backward-calls-on-one-graph")
ROUNDED = {"autocast": 0.05, "hugging-face-gpt2-own-loss": 1e-5}  # computed in lower precision, in another order
NAMES = [
    name
    for name in ZOO
    if name not in ROUNDED and not (name.rpartition("-")[0] in LOSSES and not name.endswith("-none"))
]
SEEDS = st.integers(0, 2**31)


def plain_hessian(p: Problem, calls_backward: bool) -> Tensor:
    """Row by row, on the gradient's graph; with a weight norm of which torch knows the second derivative."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(patch("torch._weight_norm", lambda v, g, dim: g * v / torch.norm_except_dim(v, 2, dim)))
        f = p.loss(*p.outputs()) if calls_backward else p.closure()
    live = [q for q in p.params if q.requires_grad]
    slopes = iter(torch.autograd.grad(f, live, create_graph=True, allow_unused=True))
    rows = []
    for q in p.params:
        g = next(slopes) if q.requires_grad else None
        if g is None or not g.requires_grad:
            rows += [torch.zeros(sum(x.numel() for x in p.params))] * q.numel()
        else:
            rows += [derivative(entry, p.params) for entry in g.reshape(-1)]
    return torch.stack([row.double() for row in rows])


def recorded(name: str, create_graph: bool = True) -> tuple[Problem, tn.Tape]:
    p = ZOO[name](torch.float64)
    torch.manual_seed(0)
    return p, tn.record(p.closure, p.params, create_graph=create_graph)


def random(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_products_of_the_zoo(name):
    _, tape = recorded(name, create_graph=False)
    expected = plain_hessian(ZOO[name](torch.float64), name in CALLS_BACKWARD)
    A = tn.Hessian(tape)
    v = torch.stack([random(A.shape[1], seed) for seed in range(2)], dim=1)
    assert_close(A @ v, expected @ v, 1e-10)
    assert A.is_symmetric
    assert not A.is_positive_semidefinite


@pytest.mark.parametrize("name", ROUNDED)
def test_products_in_lower_precision(name):
    _, tape = recorded(name)
    A = tn.Hessian(tape)
    v = random(A.shape[1], 0)
    assert_close(A @ v, plain_hessian(ZOO[name](torch.float64), False) @ v, ROUNDED[name])


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(NAMES), SEEDS, st.floats(-10, 10))
def test_linear_and_symmetric(name, seed, factor):
    _, tape = recorded(name)
    A = tn.Hessian(tape)
    u, v = random(A.shape[0], seed), random(A.shape[0], seed + 1)
    Au, Av = A @ u, A @ v
    assert abs(u @ Av - v @ Au) <= 1e-9 * (Au.norm() * v.norm() + Av.norm() * u.norm())
    assert (A @ (u + factor * v) - Au - factor * Av).norm() <= 1e-9 * (Au.norm() + abs(factor) * Av.norm())
    assert_close(flat(A.adjoint(like(tape.params, u))), Au, 1e-14)


def func_hessian(model: nn.Module, loss) -> Tensor:
    """∇² of loss(outputs of the functional model), forward over reverse."""
    names, params = zip(*model.named_parameters(), strict=True)
    shapes = [p.shape for p in params]

    def f(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes])
        values = {name: part.view(s) for name, part, s in zip(names, parts, shapes, strict=True)}
        return loss(lambda *x: functional_call(model, values, x))

    return torch.func.hessian(f)(flat(params))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 2)).double()


X, T, Y = uniform(5, 3).double(), uniform(5, 2, seed=4).double(), integers(2, 5)
IMAGES = uniform(5, 1, 3, 3).double()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (_mlp(), lambda f: F.cross_entropy(f(X), Y)),
        (_mlp(), lambda f: F.mse_loss(f(X), T, reduction="sum")),
        (_cnn(), lambda f: 3 * F.binary_cross_entropy_with_logits(f(IMAGES), T.abs())),
        (_mlp(), lambda f: F.huber_loss(f(X), T) + 0.1 * f(X).cos().prod(1).sum()),  # no split for the second part
        (_mlp(), lambda f: f(X).square().sum().sin()),  # no split at all
    ],
)
def test_against_forward_over_reverse_mode(model, loss):
    params = list(model.parameters())
    for create_graph in (True, False):
        tape = tn.record(lambda: loss(model), params, create_graph=create_graph)
        assert_close(tn.Hessian(tape).to_dense(), func_hessian(model, loss), 1e-10)
        assert_close(flat(tape.gradient), derivative(loss(model), params), 1e-12)


def test_a_penalty_counts():
    model = _mlp()
    params = list(model.parameters())

    def loss() -> Tensor:
        return F.cross_entropy(model(X), Y)

    bare = tn.Hessian(tn.record(loss, params))
    with_penalty = tn.Hessian(tn.record(lambda: loss() + 0.05 * sum(p.square().sum() for p in params), params))
    assert_close(with_penalty.to_dense(), (bare + 0.1).to_dense(), 1e-12)


def test_a_linear_loss_has_no_curvature():
    theta = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(tn.Hessian(tn.record(lambda: 3 * theta.sum(), [theta])).to_dense(), torch.zeros(2, 2))


def test_backward_with_a_weight():
    theta = torch.tensor([2.0], requires_grad=True)
    tape = tn.record(lambda: (theta**3).backward(torch.tensor([0.5])), [theta])
    assert_close(tn.Hessian(tape).to_dense(), torch.tensor([[6.0]]))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_once_differentiable_functions_are_refused():
    theta = torch.tensor([2.0], requires_grad=True)
    with pytest.raises(tn.RecordError, match="once_differentiable"):
        tn.Hessian(tn.record(lambda: _Once.apply(theta).sum(), [theta], create_graph=False)) @ torch.ones(1)


@pytest.mark.filterwarnings("ignore:part of the loss reaches the parameters:UserWarning")
def test_newton_with_the_hessian_solves_a_quadratic_in_a_step():
    theta = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    optimizer = tn.Newton([theta], curvature=tn.Hessian, damping=tn.ConstantDamping(0.0))
    optimizer.step(lambda: 0.5 * theta @ matrix @ theta + theta.sum())
    assert_close(theta, -torch.linalg.solve(matrix, torch.ones(2, dtype=torch.float64)), 1e-12)
