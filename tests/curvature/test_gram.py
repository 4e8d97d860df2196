"""RRᵀ by layers, both ways of contracting it, and what `GaussNewton` and `Auto` make of it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, dense_reference, flat
from torch import Tensor, nn
from zoo import ZOO, integers, uniform

import torchnewton as tn
from torchnewton.curvature import factor
from torchnewton.curvature.dense import replayed_rows
from torchnewton.curvature.factor import LayerRows
from torchnewton.curvature.gram import Gram
from torchnewton.curvature.layer_jacobian import LayerJacobian
from torchnewton.record import NotPerSampleError

DOUBLE = torch.float64
LAYERED = """mlp one-sample norms cnn-eval cnn-groupnorm depthwise conv1d conv3d conv-transpose embedding module-twice
 residual tied-weights two-losses two-losses-of-one-output loss-on-a-hidden-layer different-batches accumulated
 frozen-and-unused some-parameters reversed-parameters"""


def _shared_head(dtype: torch.dtype) -> tuple[list[Tensor], object]:
    """A convolution on two images of a sample, and linear layers with one place and with several."""
    torch.manual_seed(3)
    conv, time, head = nn.Conv1d(2, 3, 2), nn.Linear(4, 3), nn.Linear(9, 4, bias=False)
    for module in (conv, time, head):
        module.to(dtype)
    x, y = uniform(5, 2, 5).to(dtype), integers(4, 5)

    def closure() -> Tensor:
        h = torch.tanh(time(torch.tanh(conv(x))))
        return F.cross_entropy(head(h.flatten(1)), y) + 0.1 * F.cross_entropy(head(h.flatten(1).sin()), y)

    return [*conv.parameters(), *time.parameters(), *head.parameters()], closure


@pytest.mark.parametrize("way", ["pairs", "rows", "as counted"])
@pytest.mark.parametrize("chunk_bytes", [1, 500, 256e6])
@pytest.mark.parametrize("only", [None, 1, 2])
def test_both_ways_and_chunks(monkeypatch, way, chunk_bytes, only):
    """All parameters, the weights alone, the biases alone."""
    if way != "as counted":
        chosen, other = ("gram_by_pairs", "gram_by_rows") if way == "pairs" else ("gram_by_rows", "gram_by_pairs")
        monkeypatch.setattr(factor, chosen, lambda *_: 0.0)
        monkeypatch.setattr(factor, other, lambda *_: 1.0)
    params, closure = _shared_head(DOUBLE)
    params = [p for p in params if only is None or (p.dim() > 1) == (only == 1)]
    R = LayerRows(LayerJacobian(tn.record(closure, params)), chunk_bytes)
    rows = R.rows()
    assert_close(R.gram(DOUBLE), rows @ rows.T)
    assert_close(flat(R.diagonal()), rows.square().sum(0))


@pytest.mark.parametrize("name", LAYERED.split())
def test_gram_of_the_zoo(name):
    """Products, the dense matrix, eigenvalues those of G beside zeros."""
    p, same = ZOO[name](DOUBLE), ZOO[name](DOUBLE)
    torch.manual_seed(0)
    tape = tn.record(p.closure, p.params)
    K, G = Gram(tape), dense_reference(same.params, same.outputs, same.loss).gauss_newton
    dense, w = K.to_dense(), uniform(K.shape[0]).double()
    assert K.is_symmetric
    assert K.is_positive_semidefinite
    assert_close(dense, dense.T, 1e-12)
    assert_close(K @ w, dense @ w)
    assert torch.equal(K.to_dense(), dense)
    found, expected = torch.linalg.eigvalsh(dense).flip(0), torch.linalg.eigvalsh(G).flip(0)
    size = min(len(found), len(expected))
    assert_close(found[:size], expected[:size])
    for values in (found, expected):
        assert float(values.min()) > -1e-12 * float(values[0])
        assert not bool((values[size:].abs() > 1e-12 * values[0]).any())
    v = [uniform(*q.shape, seed=i).double() if q.dim() else uniform(1)[0].double() for i, q in enumerate(p.params)]
    assert_close(K.product(v) @ K.product(v), flat(v) @ G @ flat(v))
    assert_close(flat(K.pull_back(K.product(v))), G @ flat(v))


def test_gram_needs_samples():
    p = ZOO["custom-loss-that-mixes-samples"](DOUBLE)
    with pytest.raises(NotPerSampleError):
        Gram(tn.record(p.closure, p.params))


@pytest.mark.parametrize("name", ["batchnorm1d", "batch-in-the-middle", "scalar-output"])
def test_a_few_outputs_need_no_samples(name, monkeypatch):
    """Each takes a backward pass of its own."""
    p, same = ZOO[name](DOUBLE), ZOO[name](DOUBLE)
    expected = dense_reference(same.params, same.outputs, same.loss).gauss_newton
    tape = tn.record(p.closure, p.params)
    assert tn.GaussNewton(tape).can_factor()
    assert_close(tn.GaussNewton(tape).to_dense(), expected)
    assert_close(torch.trace(Gram(tape).to_dense()), torch.trace(expected))
    monkeypatch.setattr("torchnewton.curvature.dense.MOST_ALONE", 0)
    with pytest.raises(NotPerSampleError):
        Gram(tn.record(p.closure, p.params))


def test_initial_values_beside_residuals():
    """Outputs of a residual by sample, of two values without samples and of two samples among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    t = torch.linspace(0, 1, 30, dtype=DOUBLE)[:, None].requires_grad_()

    def outputs():
        u = model(t)
        (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return [slope + u, u[0, 0] - 1, slope[0, 0], u[[3, 7], 0], u.mean()]

    def loss(r, a, b, pair, mean):
        return (r**2).mean() + a**2 + 2 * b**2 + (pair**2).sum() + mean**2

    params = list(model.parameters())
    G = tn.GaussNewton(tn.record(lambda: loss(*outputs()), params))
    assert G.can_factor()
    assert_close(G.to_dense(), dense_reference(params, outputs, loss).gauss_newton)


def test_gram_in_float32_is_formed_in_the_precision_asked_for():
    params, closure = _shared_head(torch.float32)
    R = LayerRows(LayerJacobian(tn.record(closure, params)))
    exact = R.rows().double() @ R.rows().double().T
    assert R.gram(torch.float32).dtype is torch.float32
    assert_close(R.gram(torch.float32), exact, 1e-6)
    assert_close(R.gram(DOUBLE), exact, 1e-6)


# GaussNewton and Auto


def network(sizes: tuple[int, ...], samples: int, dtype: torch.dtype = torch.float32) -> tn.Tape:
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    model = nn.Sequential(*layers).to(dtype)
    x, y = uniform(samples, sizes[0]).to(dtype), integers(sizes[-1], samples)
    return tn.record(lambda: F.cross_entropy(model(x), y), list(model.parameters()))


def test_products_are_the_same_before_and_after_many_are_expected():
    tape = network((400, 300, 300, 2), 256, DOUBLE)
    A = tn.GaussNewton(tape)
    v = uniform(A.shape[1]).double()
    before, path = A @ v, A.path
    assert path == "kept double backward"
    A.expect(1)
    assert A.path == path
    A.expect(1000)
    assert A.path == "explicit layer factors for 100% of the parameters"
    assert_close(A @ v, before)
    fixed = tn.GaussNewton(tape, tn.Jacobian(tape))
    fixed.expect(1000)
    assert fixed.path == path


def test_costs_grow_with_the_work():
    found = [tn.GaussNewton(network((20, 30, c), n)).costs(10) for n, c in ((8, 3), (32, 3), (32, 10), (128, 10))]
    for small, large in pairwise(found):
        assert 0 < small.product <= large.product
        assert small.dense < large.dense
        assert small.gram < large.gram
        assert small.gram_rows < large.gram_rows
    A = tn.GaussNewton(network((400, 300, 300, 2), 256))
    totals = [c.setup + k * c.product for k in (1, 10, 100, 1000) for c in [A.costs(k)]]
    assert totals == sorted(totals)
    assert all(math.isfinite(t) for t in totals)


@pytest.mark.parametrize(
    ("sizes", "samples", "way", "path"),
    [
        ((4, 6, 3), 256, "direct", ""),
        ((300, 200, 2), 8, "dual", ""),
        ((100, 100, 100, 2), 3000, "CG", "explicit layer factors for 100% of the parameters"),
        ((60, 100, 60, 100), 1000, "CG", "kept double backward"),
    ],
)
def test_auto_takes_each_of_its_ways(sizes, samples, way, path):
    tape = network(sizes, samples)
    A = tn.GaussNewton(tape)
    options = tn.Auto().options(A + 0.1, tape.descent)
    result = tn.Auto().solve(A + 0.1, tape.descent)
    assert min(options, key=lambda name: options[name][0]) == way
    assert result.method.startswith(way)
    assert all(name in result.method for name in options)
    if path:
        assert A.path == path
    left = flat(tape.descent) - (A @ flat(result.solution)) - 0.1 * flat(result.solution)
    assert left.norm() <= 0.1 * flat(tape.descent).norm()


def test_auto_falls_back_to_cg_where_samples_are_mixed():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), uniform(256, 3), integers(3, 256)
    tape = tn.record(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    A = tn.GaussNewton(tape)
    assert not A.can_factor()
    result = tn.Auto().solve(A + 0.1, tape.descent)
    assert result.method.startswith("CG")
    assert "mixes samples" in result.method


DERIVED = {
    "G + 0": (lambda G, tape: G + 0.0, "CG"),
    "G - 0.1": (lambda G, tape: G - 0.1, "CG"),
    "2G + 0.1": (lambda G, tape: 2.0 * G + 0.1, "dual"),
    "2(G + 0.1)": (lambda G, tape: 2 * (G + 0.1), "dual"),
    "(-1)(-G) + 0.1": (lambda G, tape: -1.0 * -G + 0.1, "CG"),
    "3F + 0.1": (lambda G, tape: 3 * tn.EmpiricalFisher(tape) + 0.1, "dual"),
    "halves": (lambda G, tape: tn.Halves(G, tape) + 0.1, "dual"),
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("name", DERIVED)
def test_auto_takes_the_dual_system_only_where_there_is_one(name, dtype):
    tape = network((30, 40, 30, 2), 6, dtype)
    derived, way = DERIVED[name]
    A = derived(tn.GaussNewton(tape), tape)
    result = tn.Auto().solve(A, tape.descent)
    assert result.method.startswith(way)
    left = flat(tape.descent) - (A @ flat(result.solution)).to(DOUBLE)
    assert left.norm() <= (1e-4 if way == "dual" else 0.1) * flat(tape.descent).norm()


def test_auto_takes_the_next_best_where_no_rows_are_known():
    class Unfactored(tn.GaussNewton):
        def costs(self, num_products=1):
            return replace(super().costs(num_products), product=1e9, dense=1e3)

        def factored(self):
            return None

    tape = network((30, 40, 2), 6)
    A = Unfactored(tape) + 0.1
    assert min(options := tn.Auto().options(A, tape.descent), key=lambda name: options[name][0]) == "dual"
    assert tn.Auto().solve(A, tape.descent).method.startswith("direct")


@pytest.mark.parametrize("way", ["rows", "right-hand side", "products"])
def test_the_rows_of_a_multiple(way):
    tape = network((5, 6, 3), 4, DOUBLE)
    A = 3.0 * (tn.GaussNewton(tape) + 0.1)
    R, shift = A.factored()
    assert shift == pytest.approx(0.3)
    if way == "rows":
        matrix, rhs = R.normal_equations(R.preimage(tape.descent), DOUBLE)
        assert_close(matrix + shift * torch.eye(len(matrix), dtype=DOUBLE), A.to_dense())
        assert_close(rhs, flat(tape.descent))
        assert_close(R.double().gram(DOUBLE), R.gram(DOUBLE))
        assert_close(R.gram(DOUBLE).trace(), matrix.trace())
    elif way == "right-hand side":
        assert_close(flat(R.adjoint(R.preimage(tape.descent))), flat(tape.descent))
    else:
        v = [torch.ones_like(p) for p in tape.params]
        assert_close(flat(R.adjoint(R.product(v))) + shift, A @ flat(v))
    assert (-1.0 * A).factored() is None


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-3, 1e-4])
def test_samples_mixed_behind_a_small_layer(scale):
    """In float32, where BatchNorm mixes the samples of parameters that count for little beside the others."""
    torch.manual_seed(0)
    a, norm, b = nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)
    gain = nn.Parameter(torch.ones(4))
    with torch.no_grad():
        b.weight.mul_(scale)
    params, x, y = [*a.parameters(), gain, *b.parameters()], torch.randn(16, 3), torch.randn(16, 2)
    tape = tn.record(lambda: F.mse_loss(b(torch.tanh(norm(a(x)) * gain)), y), params)
    with pytest.raises(NotPerSampleError):
        tn.Gram(tape)
    v = torch.cat([torch.randn(12), torch.zeros(18)])
    for A in (tn.GaussNewton(tape), tn.EmpiricalFisher(tape)):
        assert not A.can_factor()
        assert_close((A.to_dense() @ v.double())[:12], (A @ v)[:12], 1e-4)


def test_parts_that_are_all_rounding():
    """In float32 the derivative in a bias in front of a normalization is noise, large where the inputs are small."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8)]
    model = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    x, y = 1e-3 * torch.randn(32, 2, 8, 8), torch.randint(3, (32,))
    tape = tn.record(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    assert replayed_rows(tape).num_rows == 64
    assert tn.EmpiricalFisher(tape).can_factor()
