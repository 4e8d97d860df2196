"""K-FAC against dense matrices: its factors, where it is exact, its inverse, its memory."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, flat, like
from torch import Tensor, nn
from zoo import ZOO, uniform

import torchnewton as tn
from torchnewton.curvature.kfac.blocks import Block, KroneckerBlocks
from torchnewton.curvature.kfac.sampling import sampled_cotangents
from torchnewton.curvature.kfac.spectra import Eigenpairs, KroneckerInverse

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def once(tape: tn.Tape, **arguments) -> tn.KFAC:
    kfac = tn.KFAC(**arguments)
    kfac.update(tape)
    return kfac


def averaged(tape: tn.Tape, count: int, **arguments) -> tn.KFAC:
    kfac = tn.KFAC(statistics_every=1, decay=1.0, **arguments)
    for _ in range(count):
        kfac.update(tape)
    return kfac


def blocks_of(matrix: Tensor, groups: list[list[int]]) -> list[Tensor]:
    return [matrix[i][:, i] for i in map(torch.tensor, groups)]


def layer_indices(params: list[Tensor], layers: list[list[int]]) -> list[list[int]]:
    """The positions of the entries of each layer's parameters in a flat vector."""
    ends = list(itertools.accumulate(p.numel() for p in params))
    return [[i for p in layer for i in range(ends[p] - params[p].numel(), ends[p])] for layer in layers]


def assert_covariance(tape: tn.Tape, term: Any, count: int) -> None:
    """That of u is B, to six standard errors."""
    unit = torch.eye(sum(z.numel() for z in term.outputs))
    B = torch.stack([flat(term.hessian_product(like(term.outputs, e))) for e in unit])
    generator = torch.Generator().manual_seed(0)
    u = torch.stack([flat(sampled_cotangents(tape, generator)[0]) for _ in range(count)])
    spread = (B.diagonal()[:, None] * B.diagonal()).sqrt()
    assert ((u.T @ u / count - B).abs() <= 6 / count**0.5 * spread + 1e-12).all()


@pytest.mark.parametrize("name", [n for n in ZOO if n.endswith("-mean")])
def test_cotangents_have_the_covariance_of_the_output_hessian(name):
    p = ZOO[name](torch.float64)
    term = (tape := tn.record(p.closure, p.params)).terms[0]
    assert_covariance(tape, term, 200)


@pytest.mark.parametrize("name", ["two-losses-of-one-output", "loss-between-two-heads", "two-marked-outputs"])
def test_cotangents_of_coupled_outputs(name):
    p = ZOO[name](torch.float64)
    term = (tape := tn.record(p.closure, p.params)).terms[0]
    assert_covariance(tape, term, 200)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_exact_for_one_sample(loss, reduction):
    """With one sample a factors out of the expectation: the blocks are those of G, up to the sampling of S."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = uniform(1, 3).double(), torch.tensor([1]) if loss is F.cross_entropy else uniform(1, 3, seed=4).double()
    tape = tn.record(lambda: loss(model(x), y, reduction=reduction), list(model.parameters()))
    groups = layer_indices(tape.params, [[0, 1], [2, 3]])
    found = blocks_of(averaged(tape, 400).approximation.to_dense(), groups)
    for K, G in zip(found, blocks_of(tn.GaussNewton(tape).to_dense(), groups), strict=True):
        assert_close(K, G, 0.15)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_exact_for_deep_linear_networks(sharing):
    """Squared error, whose S does not depend on the sample. Of sequences: a loss on every place is exact by "expand", a
    loss on the mean over equal places by "reduce" (Eschenhagen et al., sections 3.1 and 3.2)."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 2))
    x, y = uniform(4, 5, 3).double(), uniform(4, 5, 2, seed=3).double()

    def closure() -> Tensor:
        z = model(x)
        return F.mse_loss(z, y) if sharing == "expand" else F.mse_loss(z.mean(1), y.mean(1), reduction="sum")

    tape = tn.record(closure, list(model.parameters()))
    groups = layer_indices(tape.params, [[0, 1], [2], [3, 4]])
    found = blocks_of(averaged(tape, 300, sharing=sharing).approximation.to_dense(), groups)
    for K, G in zip(found, blocks_of(tn.GaussNewton(tape).to_dense(), groups), strict=True):
        assert_close(K, G, 0.15)


def test_exact_with_all_signs():
    """The expectation over u by all 2⁴ sign patterns, for squared error at two samples with two outputs."""
    W, x = random(2, 3), random(2, 3, seed=1)
    patterns = [torch.tensor(s).view(2, 2) for s in itertools.product([-1.0, 1.0], repeat=4)]
    S = torch.stack([u.T @ u for u in patterns]).mean(0) * (2 / 4)
    G = tn.GaussNewton(tn.record(lambda: F.mse_loss(x @ W.T, torch.zeros(2, 2)), [W.requires_grad_()])).to_dense()
    assert_close(torch.kron(S, x.T @ x / 2), G)


def _delta_and_factors(layer: nn.Module, x: Tensor, **arguments) -> tuple[Tensor, Block]:
    """The cotangents at the layer's output, and the block that K-FAC makes of them."""
    deltas: list[Tensor] = []

    def closure() -> Tensor:
        s = layer(x)
        if s.requires_grad:
            s.register_hook(deltas.append)
        return 0.5 * F.mse_loss(s, torch.zeros_like(s), reduction="sum")

    kfac = tn.KFAC(**arguments)
    tape = tn.record(closure, list(layer.parameters()))
    deltas.clear()
    kfac.update(tape)
    (block,) = kfac.approximation.kronecker_blocks
    return deltas[-1], block


def test_linear_factors():
    x = uniform(3, 4, 5).double()
    delta, block = _delta_and_factors(nn.Linear(5, 2), x)
    R = sum(torch.outer(a, a) for n in range(3) for t in range(4) for a in [torch.cat([x[n, t], torch.ones(1)])]) / 12
    L = sum(torch.outer(d, d) for d in delta.flatten(0, 1))
    assert_close(block.left[0], L)
    assert_close(block.right[0], R)
    delta, block = _delta_and_factors(nn.Linear(5, 2), x, sharing="reduce")
    means = [torch.cat([x[n].mean(0), torch.ones(1)]) for n in range(3)]
    assert_close(block.right[0], sum(torch.outer(a, a) for a in means) / 3)
    assert_close(block.left[0], sum(torch.outer(d, d) for d in delta.sum(1)))


CONVOLUTIONS = {
    "plain": (nn.Conv2d, (2, 3, 2), {}, (3, 2, 5, 4)),
    "stride and padding": (nn.Conv2d, (2, 3, 3), {"stride": 2, "padding": 1}, (3, 2, 5, 6)),
    "dilation": (nn.Conv2d, (2, 3, 2), {"dilation": 2, "padding": (0, 1)}, (2, 2, 5, 4)),
    "groups": (nn.Conv2d, (4, 6, 2), {"groups": 2}, (3, 4, 4, 3)),
    "same": (nn.Conv2d, (2, 2, 2), {"padding": "same"}, (2, 2, 3, 3)),
    "circular": (nn.Conv2d, (2, 2, 3), {"padding": 1, "padding_mode": "circular"}, (2, 2, 4, 3)),
    "1d": (nn.Conv1d, (2, 3, 3), {"bias": False}, (3, 2, 6)),
    "3d": (nn.Conv3d, (1, 2, 2), {"stride": (1, 2, 1)}, (2, 1, 3, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_factors(name, sharing):
    """The patch at a place is the derivative of the output there in the weights of one channel."""
    kind, sizes, options, shape = CONVOLUTIONS[name]
    layer, x = kind(*sizes, **options), random(*shape)
    delta, block = _delta_and_factors(layer, x, sharing=sharing)
    g, n, out = layer.groups, len(delta), layer.weight.shape[0] // layer.groups
    dense = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), layer.weight.detach()
    )
    for group in range(g):
        channel = group * out
        patches = dense[:, channel].flatten(1, -layer.weight.dim() - 1)[:, :, channel].flatten(2)  # n × places × K
        if layer.bias is not None:
            patches = torch.cat([patches, torch.ones(*patches.shape[:2], 1)], dim=2)
        d = delta.reshape(n, g, out, -1)[:, group].mT
        if sharing == "reduce":
            patches, d = patches.mean(1, keepdim=True), d.sum(1, keepdim=True)
        rows = patches.flatten(0, 1)
        assert_close(block.right[group], rows.T @ rows / len(rows))
        assert_close(block.left[group], d.flatten(0, 1).T @ d.flatten(0, 1))


def test_fewer_places_keep_the_mean():
    """Places that are all alike give the same factors however few of them are taken."""
    x = torch.ones(6, 2, 9, 9)
    for layer in (nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3, stride=2, dilation=2)):
        full = _delta_and_factors(layer, x)[1]
        for places in (1, 3, 7, 50):
            assert_close(_delta_and_factors(layer, x, max_places=places)[1].right, full.right)
    x = uniform(8, 4, 3).double()
    few = _delta_and_factors(nn.Linear(3, 2), x, max_places=11)[1]
    rows = F.pad(x.reshape(-1, 3)[::3], [0, 1], value=1.0)
    assert_close(few.right[0], rows.T @ rows / len(rows))


def test_large_factors_are_diagonal():
    x = uniform(3, 5).double()
    full, diagonal = _delta_and_factors(nn.Linear(5, 2), x)[1], _delta_and_factors(nn.Linear(5, 2), x, max_size=4)[1]
    assert_close(diagonal.right[0], full.right[0].diagonal())
    assert_close(diagonal.left, full.left)


def test_embedding_factors():
    layer, tokens = nn.Embedding(5, 3, padding_idx=1), torch.tensor([[0, 2, 1], [2, 2, 4]])
    delta, block = _delta_and_factors(layer, tokens)
    kept = delta.reshape(-1, 3)[tokens.reshape(-1) != 1]
    assert_close(block.left[0], torch.tensor([1.0, 0.0, 3.0, 0.0, 1.0]) / 5)
    assert_close(block.right[0], kept.T @ kept)


NORMS = {
    "layer": (nn.LayerNorm(3), (5, 4, 3)),
    "layer over two": (nn.LayerNorm((4, 3)), (5, 4, 3)),
    "rms": (nn.RMSNorm(3), (5, 4, 3)),
    "group": (nn.GroupNorm(2, 4), (5, 4, 3)),
    "batch": (nn.BatchNorm1d(3), (6, 3)),
    "batch of images": (nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "instance": (nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
}


@pytest.mark.parametrize("name", NORMS)
def test_scale_and_shift_of_norms(name):
    """Their block of G: as the last layer, with the samples independent given the normalized input."""
    layer, shape = NORMS[name]
    layer, x = layer.double(), random(*shape)
    tape = tn.record(lambda: F.mse_loss(layer(x), torch.zeros_like(x), reduction="sum"), list(layer.parameters()))
    K, G = averaged(tape, 400).approximation.to_dense(), tn.GaussNewton(tape).to_dense()
    if name == "instance":
        assert_close(K.diagonal(), G.diagonal(), 0.25)
    else:
        assert_close(K, G, 0.25)


def test_other_parameters_have_their_diagonal():
    w, x = nn.Parameter(random(3, 2)), random(5, 3, seed=1)
    tape = tn.record(lambda: F.mse_loss((x @ w).sin(), torch.zeros(5, 2)), [w])
    found, G = averaged(tape, 500).approximation.to_dense(), tn.GaussNewton(tape).to_dense()
    assert_close(found, torch.diag(G.diagonal()), 0.2)


def test_several_uses_keep_both_partial_traces():
    """Two layers with one weight: the traces over either side are those of the sum of the two Kronecker products."""
    weight = nn.Parameter(random(3, 3))
    first, second = nn.Parameter(random(3)), nn.Parameter(random(3, seed=1))
    x, y = uniform(4, 3).double(), uniform(4, 3, seed=3).double()
    apart = [nn.Parameter(weight.detach().clone()) for _ in range(2)]

    def loss(u: Tensor, v: Tensor) -> Tensor:
        return F.mse_loss(F.linear(torch.tanh(F.linear(x, u, first)), v, second), y)

    shared = once(tn.record(lambda: loss(weight, weight), [weight, first, second])).approximation
    single = once(tn.record(lambda: loss(*apart), [*apart, first, second])).approximation
    assert sorted(b.positions for b in shared.kronecker_blocks) == [(0,), (1,), (2,)]
    expected = torch.zeros(9, 9)
    for block in single.kronecker_blocks:
        expected += torch.kron(block.left[0], block.right[0][:3, :3])
    found = shared.to_dense()[:9, :9].view(3, 3, 3, 3)
    expected = expected.view(3, 3, 3, 3)
    for over in ("iaja->ij", "aiaj->ij"):
        assert_close(torch.einsum(over, found), torch.einsum(over, expected))


def test_embedding_tied_to_the_output_layer():
    table, tokens = nn.Parameter(random(5, 3)), torch.tensor([[0, 2], [3, 3]])
    tape = tn.record(
        lambda: F.cross_entropy(F.linear(F.embedding(tokens, table).sin().mean(1), table), tokens[:, 0]), [table]
    )
    kfac = once(tape)
    (block,) = kfac.approximation.kronecker_blocks
    assert (block.left.shape, block.right.shape) == ((1, 5, 5), (1, 3, 3))
    assert torch.linalg.eigvalsh(kfac.inverse(0.1).to_dense())[0] > 0


def spd(g: int, n: int, seed: int) -> Tensor:
    X = random(g, n, n + 2, seed=seed)
    return X @ X.mT


PAIRS = {
    "both dense": (spd(1, 4, 1), spd(1, 5, 2)),
    "groups": (spd(3, 4, 1), spd(3, 2, 2)),
    "diagonal left": (random(1, 4).square(), spd(1, 5, 2)),
    "diagonal right": (spd(2, 4, 1), random(2, 3).square()),
    "both diagonal": (random(1, 4).square(), random(1, 3).square()),
    "one row": (spd(1, 1, 4), spd(1, 6, 3)),
    "zero": (0 * spd(1, 2, 4), spd(1, 3, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_block_and_inverse_against_dense(name):
    left, right = PAIRS[name]
    g, o = left.shape[:2]
    params = [torch.zeros(g * o, right.shape[1] - 1), torch.zeros(g * o), torch.zeros(2)]
    if right.shape[1] == 1 or o == 1:
        params = [torch.zeros(g * o, right.shape[1]), torch.zeros(2)]
    block = Block(tuple(range(len(params) - 1)), left, right)
    dense = torch.block_diag(
        *[torch.kron(*(torch.diag(f[i]) if f.dim() == 2 else f[i] for f in (left, right))) for i in range(g)]
    )
    # the entries of V, g × O × K, in the order of the parameters
    V = torch.arange(g * o * right.shape[1]).view(g, o, -1)
    order = V.flatten() if len(params) == 2 else torch.cat([V[..., :-1].flatten(), V[..., -1].flatten()])
    expected = torch.block_diag(dense[order][:, order], torch.zeros(2, 2))
    A = KroneckerBlocks(params, [block])
    assert_close(A.to_dense(), expected)
    assert_close(flat(A.diagonal().value), expected.diagonal())
    spectra = {block.positions: (Eigenpairs.of(left, 1.0), Eigenpairs.of(right, 1.0))}
    for damping in (1e-3, 0.1, 10.0):
        M = KroneckerInverse(params, [block], spectra, damping)
        assert_close(M.to_dense(), torch.linalg.inv(expected + damping * torch.eye(len(expected))))


def test_leading_eigenpairs():
    """The trace and the leading part are right, and the inverse is exact for the matrix that they stand for."""
    Q = torch.linalg.qr(random(200, 200)).Q
    values = torch.cat([torch.logspace(2, 0, 20), torch.full((180,), 0.01)])
    factor = (Q * values) @ Q.T
    found = Eigenpairs.of(factor.unsqueeze(0), 1 / 16)
    assert found.values.shape == (1, 32)
    stood_for = found.basis[0] @ torch.diag(found.values[0] - found.tail[0]) @ found.basis[0].T + found.tail[
        0
    ] * torch.eye(200)
    assert_close(stood_for, factor, 1e-5)
    assert abs(float(stood_for.trace() / values.sum()) - 1) < 1e-12
    left = spd(1, 3, 1)
    for pair, dense in (
        ((left, factor.unsqueeze(0)), torch.kron(left[0], stood_for)),
        ((factor.unsqueeze(0), left), torch.kron(stood_for, left[0])),
        ((random(1, 3).square(), factor.unsqueeze(0)), torch.kron(torch.diag(random(1, 3).square()[0]), stood_for)),
    ):
        block = Block((0,), *pair)
        spectra = {(0,): tuple(Eigenpairs.of(f, 1 / 16) for f in pair)}
        M = KroneckerInverse([torch.zeros(block.left.shape[1], block.right.shape[1])], [block], spectra, 0.05)
        v = random(600, seed=4)
        assert_close(M @ v, torch.linalg.solve(dense + 0.05 * torch.eye(600), v), 1e-9)
    both = Block((0,), factor.unsqueeze(0), factor[:150, :150].unsqueeze(0))
    pair = (Eigenpairs.of(both.left, 1 / 16), Eigenpairs.of(both.right, 1 / 16))
    V = random(200, 150, seed=5)
    X = (KroneckerInverse([V], [both], {(0,): pair}, 0.05) @ [V])[0]
    L, R = (
        s.basis[0] @ torch.diag(s.values[0] - s.tail[0]) @ s.basis[0].T + s.tail[0] * torch.eye(len(s.basis[0]))
        for s in pair
    )
    assert_close(L @ X @ R + 0.05 * X, V, 1e-9)


@pytest.mark.parametrize(
    ("name", "sharing"),
    [(n, "expand") for n in ZOO] + [(n, "reduce") for n in ("gpt", "cnn-groupnorm", "conv3d", "mlp")],
)
def test_positive_definite_everywhere(name, sharing):
    p = ZOO[name](torch.float64)
    tape = tn.record(p.closure, p.params)
    if not all(term.outputs for term in tape.terms):
        with pytest.raises(tn.RecordError, match="split"):
            once(tape)
        return
    M = once(tape, sharing=sharing, max_places=17).inverse(0.1)
    dense = M.to_dense()
    assert_close(dense, dense.T)
    values = torch.linalg.eigvalsh(dense)
    assert values[0] > 0
    assert values[-1] <= 10 * (1 + 1e-9)


def test_frozen_and_unused_parameters_are_divided_by_damping():
    layer, unused = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
    layer.bias.requires_grad_(False)
    params = [*layer.parameters(), unused]
    tape = tn.record(lambda: F.mse_loss(layer(uniform(4, 3).double()), torch.zeros(4, 2)), params)
    kfac = once(tape)
    assert [b.positions for b in kfac.approximation.kronecker_blocks] == [(0,)]
    found = kfac.inverse(0.5) @ [torch.ones_like(p) for p in params]
    assert torch.equal(found[1], torch.full((2,), 2.0))
    assert torch.equal(found[2], torch.full((2,), 2.0))


def _problem(scale: float = 1.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = uniform(16, 4).double() * scale, torch.arange(16) % 3

    def tape(n: int = 16, reduction: str = "mean") -> tn.Tape:
        return tn.record(lambda: F.cross_entropy(model(x[:n]), y[:n], reduction=reduction), list(model.parameters()))

    return model, tape


def test_scale_of_sum_and_mean():
    """f = sum is 16 times f = mean, and so is G."""
    _, tape = _problem()
    total, mean = once(tape(reduction="sum")).approximation, once(tape()).approximation
    assert_close(total.to_dense(), 16 * mean.to_dense())


def test_running_averages_and_schedules():
    _, tape = _problem()
    tapes = [tape(8 + i) for i in range(7)]
    kfac = tn.KFAC(statistics_every=3, inverses_every=4, decay=0.8)
    generator = torch.Generator().manual_seed(0)
    samples, products = [], []
    v = [random(*p.shape) for p in tapes[0].params]
    for i, t in enumerate(tapes):
        kfac.update(t)
        if i % 3 == 0:
            samples.append(kfac._statistics.blocks(t, generator))
        products.append(flat(kfac.inverse(0.1) @ v))
    # the first two evenly, then 0.8³ for the past
    for k, block in enumerate(kfac.approximation.kronecker_blocks):
        for side in ("left", "right"):
            a, b, c = (getattr(s[k], side) for s in samples)
            assert_close(getattr(block, side), 0.512 * (0.5 * a + 0.5 * b) + 0.488 * c)
    fresh = [i for i in range(1, 7) if not torch.equal(products[i], products[i - 1])]
    assert fresh == [3]  # statistics have doubled; four steps later comes the next
    assert torch.equal(flat(kfac.inverse(0.1) @ v), products[-1])
    kfac.update(tapes[0])
    assert not torch.equal(flat(kfac.inverse(0.1) @ v), products[-1])


def test_another_damping_needs_nothing_new():
    _, tape = _problem()
    kfac = once(tape(), share=1.0)
    kfac.inverse(1.0)
    spectra = kfac._spectra
    dense = kfac.approximation.to_dense()
    for damping in (1e-3, 10.0):
        expected = torch.linalg.inv(dense + damping * torch.eye(len(dense)))
        assert_close(kfac.inverse(damping).to_dense(), expected)
    assert kfac._spectra is spectra


@pytest.mark.parametrize("name", ["gpt", "cnn-batchnorm-dropout", "tied-weights"])
def test_continues_bit_for_bit(name):
    def run(steps: list[int], kfac: tn.KFAC) -> Tensor:
        for i in steps:
            torch.manual_seed(i)
            p = ZOO[name](torch.float64)
            kfac.update(tn.record(p.closure, p.params))
            M = kfac.inverse(0.1 + 0.01 * i)
        return M @ torch.ones(M.shape[1])

    arguments = {"statistics_every": 2, "inverses_every": 5}
    whole = run(list(range(9)), tn.KFAC(**arguments))
    first = tn.KFAC(**arguments)
    run([0, 1, 2, 3], first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = tn.KFAC(**arguments, seed=5)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run([4, 5, 6, 7, 8], second), whole)


def test_statistics_that_are_not_finite_are_left_out():
    model, tape = _problem()
    kfac = tn.KFAC(statistics_every=1)
    kfac.update(tape())
    before = kfac.approximation.to_dense()
    broken = tape()
    with torch.no_grad():
        for z in broken.terms[0].cotangents:
            z.fill_(float("nan"))
        model[2].weight.fill_(float("nan"))
    kfac.update(tape())
    assert torch.equal(kfac.approximation.to_dense(), before)


def test_another_use_of_the_parameters_starts_anew():
    w, b = nn.Parameter(random(2, 3)), nn.Parameter(random(2, seed=1))
    x = uniform(4, 3).double()
    kfac = tn.KFAC(statistics_every=1)
    zero = torch.zeros(4, 2)
    kfac.update(tn.record(lambda: F.mse_loss(F.linear(x, w, b), zero), [w, b]))
    assert [block.positions for block in kfac.approximation.kronecker_blocks] == [(0, 1)]
    kfac.inverse(1.0)
    kfac.update(tn.record(lambda: F.mse_loss(F.linear(x, w) + b, zero), [w, b]))
    assert sorted(block.positions for block in kfac.approximation.kronecker_blocks) == [(0,), (1,)]
    assert torch.linalg.eigvalsh(kfac.inverse(1.0).to_dense())[0] > 0


def test_low_precision_parameters():
    p = ZOO["mlp"](torch.bfloat16)
    kfac = once(tn.record(p.closure, p.params))
    assert {b.left.dtype for b in kfac.approximation.kronecker_blocks} == {torch.float32}
    assert {x.dtype for x in kfac.inverse(0.1) @ [torch.ones_like(q) for q in p.params]} == {torch.bfloat16}


def test_fewer_iterations_on_an_ill_conditioned_problem():
    """Inputs of scales 1 to 1000 in a linear model, where K-FAC is exact in expectation."""
    x = uniform(64, 12).double() * torch.logspace(0, 3, 12)
    layer = nn.Linear(12, 3)
    tape = tn.record(lambda: F.mse_loss(layer(x), torch.zeros(64, 3)), list(layer.parameters()))
    A, b, cg = tn.GaussNewton(tape) + 1e-3, tape.gradient, tn.CG(rtol=1e-8, max_iterations=500)
    M = averaged(tape, 50).inverse(1e-3)
    assert 3 * cg.solve(A, b, preconditioner=M).num_iterations <= cg.solve(A, b).num_iterations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.5}, "decay=1.5"),
        ({"share": 0.0}, "share=0.0"),
        ({"sharing": "other"}, "sharing='other'"),
        ({"statistics_every": 0}, "statistics_every=0"),
        ({"max_places": 0}, "max_places=0"),
    ],
)
def test_misuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        tn.KFAC(**arguments)


def test_misuse_of_the_inverse():
    with pytest.raises(ValueError, match="update"):
        tn.KFAC().inverse(1.0)
    kfac = once(_problem()[1]())
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping"):
            kfac.inverse(damping)
