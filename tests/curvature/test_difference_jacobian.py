"""The Jacobian by differences: as accurate as it says, and without a trace."""

import pytest
import torch
from zoo import ZOO

import torchnewton as tn


@pytest.mark.parametrize(
    "name", ["mlp", "cnn-eval", "cnn-batchnorm-dropout", "lstm", "gpt", "two-losses", "different-batches"]
)
def test_products_agree_with_double_backward(name):
    torch.manual_seed(0)
    problem = ZOO[name](torch.float64)
    tape = tn.record(problem.closure, problem.params)
    before = [p.detach().clone() for p in problem.params]
    v = [torch.randn_like(p) for p in problem.params]
    J = tn.DifferenceJacobian(tape)
    for found, exact in zip(J @ v, tn.Jacobian(tape) @ v, strict=True):
        assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())
    u = [torch.randn_like(z) for z in tape.outputs]
    for found, exact in zip(J.adjoint(u), tn.Jacobian(tape).adjoint(u), strict=True):
        assert torch.equal(found, exact)
    assert all(torch.equal(p, q) for p, q in zip(problem.params, before, strict=True))


def test_nothing_moves_along_nothing():
    problem = ZOO["mlp"](torch.float64)
    tape = tn.record(problem.closure, problem.params)
    assert not any(bool(y.any()) for y in tn.DifferenceJacobian(tape) @ [torch.zeros_like(p) for p in problem.params])


def test_a_plane_of_differences_keeps_no_second_graph():
    problem = ZOO["mlp"](torch.float64)
    optimizer = tn.Newton(
        problem.params,
        curvature=lambda tape: tn.GaussNewton(tape, tn.DifferenceJacobian(tape)),
        solver=tn.Plane(),
        damping=tn.ConstantDamping(1e-3),
    )
    losses = [float(optimizer.step(problem.closure)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert optimizer.report.jacobian == "differences of outputs"
