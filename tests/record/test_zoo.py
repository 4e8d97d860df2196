"""Every network, loss and closure of the zoo against the independent reference."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Reference, assert_close, dense_reference, flat, like
from zoo import ZOO, Problem

import torchnewton as tn

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # of kl_div

CALLS_BACKWARD = ("accumulated", "two-backward-calls-on-one-graph")
SEEDS = st.integers(0, 2**31)


@cache
def expected(name: str, dtype: torch.dtype = torch.float64) -> Reference:
    p = ZOO[name](dtype)
    return dense_reference(p.params, p.outputs, p.loss)


def recorded(name: str, dtype: torch.dtype = torch.float64) -> tuple[Problem, tn.Tape]:
    p = ZOO[name](dtype)
    torch.manual_seed(0)
    return p, tn.record(p.closure, p.params)


def random(size: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# buffers move on, and a tape knows the outputs as they are at the end
OTHER_OUTPUTS = ("spectral-norm", "outputs-changed-in-place-after-the-loss")


@pytest.mark.parametrize("name", [name for name in ZOO if name not in OTHER_OUTPUTS])
def test_outputs_again_are_the_outputs(name):
    _, tape = recorded(name)
    again = tape.evaluate_outputs()
    assert not any(z.requires_grad for z in again)
    for z, before in zip(again, tape.outputs, strict=True):
        assert_close(z, before.detach(), 1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_loss_gradient_and_gauss_newton(name):
    p, tape = recorded(name)
    e = expected(name)
    assert e.gauss_newton.norm() > 0
    A = tn.GaussNewton(tape)
    assert tape.loss.shape == ()
    assert not tape.loss.requires_grad
    assert_close(tape.loss, e.loss, p.rtol)
    assert [g.shape for g in tape.gradient] == [q.shape for q in p.params]
    assert_close(flat(tape.gradient), e.gradient, p.rtol)
    assert A.shape == tuple(e.gauss_newton.shape)
    assert_close(A.to_dense(), e.gauss_newton, p.rtol)
    for seed in range(3):
        v = random(A.shape[1], seed)
        assert_close(A @ v, e.gauss_newton @ v, p.rtol)


@pytest.mark.parametrize("name", ZOO)
def test_jacobian_rows_and_products(name):
    p, tape = recorded(name)
    e = expected(name)
    J = tn.Jacobian(tape)
    assert J.shape == tuple(e.jacobian.shape)
    assert sum(z.numel() for z in tape.outputs) == J.shape[0]
    assert_close(J.to_dense(), e.jacobian, p.rtol)
    v, u = random(J.shape[1], 1), random(J.shape[0], 2)
    assert_close(J @ v, e.jacobian @ v, p.rtol)
    parts = u.split([z.numel() for z in tape.outputs])
    adjoint = J.adjoint([part.view_as(z).to(z.dtype) for part, z in zip(parts, tape.outputs, strict=True)])
    assert_close(flat(adjoint), e.jacobian.T @ u, max(p.rtol, 1e-10))


@pytest.mark.parametrize("name", [name for name in ZOO if name not in CALLS_BACKWARD])
def test_closure_that_calls_zero_grad_and_backward(name):
    p = ZOO[name](torch.float64)
    e = expected(name)

    def closure():
        for q in p.params:
            q.grad = None
        loss = p.closure()
        loss.backward()
        return loss

    torch.manual_seed(0)
    tape = tn.record(closure, p.params)
    grad = flat([torch.zeros_like(q) if q.grad is None else q.grad for q in p.params])
    assert_close(grad, e.gradient, p.rtol)
    assert_close(flat(tape.gradient), e.gradient, p.rtol)
    assert_close(tape.loss, e.loss, p.rtol)
    v = random(len(grad), 0)
    assert_close(tn.GaussNewton(tape) @ v, e.gauss_newton @ v, p.rtol)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "autocast"])
def test_float32(name):
    _, tape = recorded(name, torch.float32)
    e = expected(name, torch.float32)
    assert_close(flat(tape.gradient), e.gradient, 1e-4)
    v = random(len(e.gradient), 0, torch.float32)
    product = tn.GaussNewton(tape) @ v
    assert product.dtype == torch.float32
    assert_close(product, e.gauss_newton @ v.double(), 1e-3)
    assert_close(tn.GaussNewton(tape).to_dense(), e.gauss_newton, 1e-4)


def test_bfloat16_autocast_of_float32_parameters():
    """To the accuracy of bfloat16, against the same network without autocast; and not exactly."""
    _, tape = recorded("autocast", torch.float32)
    e = expected("mlp", torch.float32)
    v = random(len(e.gradient), 0, torch.float32)
    for found, exact in (
        (flat(tape.gradient), e.gradient),
        (tn.GaussNewton(tape) @ v, e.gauss_newton @ v.double()),
        (tn.GaussNewton(tape).to_dense(), e.gauss_newton),
    ):
        assert_close(found, exact, 2e-2)
        assert (found.double() - exact).norm() > 1e-5 * exact.norm()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(ZOO)), SEEDS, st.floats(-10, 10))
def test_gauss_newton_is_linear_symmetric_and_positive_semidefinite(name, seed, factor):
    p, tape = recorded(name)
    A = tn.GaussNewton(tape)
    u, v = random(A.shape[0], seed), random(A.shape[0], seed + 1)
    Au, Av = A @ u, A @ v
    scale = Au.norm() * v.norm() + Av.norm() * u.norm()
    rtol = 10 * p.rtol
    assert A.is_symmetric
    assert A.is_positive_semidefinite
    assert abs(u @ Av - v @ Au) <= rtol * scale
    assert u @ Au >= -rtol * scale
    assert (A @ (u + factor * v) - Au - factor * Av).norm() <= rtol * (Au.norm() + abs(factor) * Av.norm())


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(ZOO)), SEEDS)
def test_jacobian_and_its_adjoint_belong_together(name, seed):
    p, tape = recorded(name)
    J = tn.Jacobian(tape)
    v = random(J.shape[1], seed)
    u = [random(z.numel(), seed + 1 + i).view_as(z).to(z.dtype) for i, z in enumerate(tape.outputs)]
    Jv, Jtu = J @ v, flat(J.adjoint(u))
    assert abs(Jv.double() @ flat(u).double() - v @ Jtu) <= 10 * p.rtol * (
        Jv.norm() * flat(u).norm() + v.norm() * Jtu.norm()
    )


def test_products_of_lists_and_of_flat_tensors_agree():
    p, tape = recorded("gpt")
    for A in (
        tn.GaussNewton(tape),
        tn.GaussNewton(tape) + 0.5,
        2.0 * tn.GaussNewton(tape),
        tn.Jacobian(tape),
    ):
        v = random(A.shape[1], 0)
        as_list = A @ like(p.params, v)
        assert isinstance(as_list, list)
        assert_close(flat(as_list), A @ v, 1e-14)


def test_shifted_scaled_and_summed_operators():
    _, tape = recorded("mlp")
    G = expected("mlp").gauss_newton
    A = tn.GaussNewton(tape)
    eye = torch.eye(len(G), dtype=G.dtype)
    v = random(len(G), 0)
    for operator, matrix in (
        (A + 0.3, G + 0.3 * eye),
        (2.0 * A, 2 * G),
        (A + A, 2 * G),
        (0.5 * (A + 2.0), 0.5 * G + eye),
    ):
        assert_close(operator @ v, matrix @ v)
        assert_close(operator.to_dense(), matrix)
        assert operator.is_symmetric
        assert operator.is_positive_semidefinite
    assert not (A + (-0.1)).is_positive_semidefinite


@pytest.mark.parametrize("wrong", [torch.zeros(3), [torch.zeros(2)]])
def test_product_with_a_vector_of_the_wrong_shape(wrong):
    _, tape = recorded("mlp")
    with pytest.raises(ValueError, match="shape"):
        tn.GaussNewton(tape) @ wrong
