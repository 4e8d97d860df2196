"""Explicit layer factors against Jacobians by torch.func from the functional model, and over the zoo."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from reference import Reference, assert_close, dense_reference, flat, like
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, integers, uniform

import torchnewton as tn
from torchnewton.curvature import factor
from torchnewton.curvature.factor import LayerRows
from torchnewton.curvature.layer_jacobian import LayerJacobian
from torchnewton.curvature.layer_jacobian.cut import Cut, Users, find_cut
from torchnewton.record import NotPerSampleError

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides the total loss:UserWarning",  # of kl_div
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning",  # of torch.func.hessian
    "ignore:Using padding='same' with even kernel lengths:UserWarning",
)

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def agrees(tape: tn.Tape, e: Reference, rtol: float = 1e-10, max_bytes: float = 2e9) -> LayerJacobian:
    """Products, adjoints and rows of J and of R = B^½J."""
    J = LayerJacobian(tape, max_bytes)
    dtype = tape.params[0].dtype
    v, u = random(J.shape[1], seed=1).to(dtype), random(J.shape[0], seed=2)
    assert_close(J @ v, e.jacobian @ v.double(), rtol)
    parts = [
        y.to(z.dtype).view_as(z) for y, z in zip(u.split([z.numel() for z in J.codomain]), J.codomain, strict=True)
    ]
    assert_close(flat(J.adjoint(parts)), e.jacobian.T @ flat(parts).double(), rtol)
    assert_close(J.to_dense(), e.jacobian, rtol)
    assert_close(tn.GaussNewton(tape, J) @ v, e.gauss_newton @ v.double(), rtol)
    try:
        R = LayerRows(J)
    except NotPerSampleError:
        return J
    assert_close(flat(R.adjoint(R.product(like(tape.params, v)))), e.gauss_newton @ v.double(), rtol)
    if R.factors.is_complete:
        rows = R.rows().double()
        assert_close(rows.T @ rows, e.gauss_newton, rtol)
        assert_close(R.gram(DOUBLE), rows @ rows.T, rtol)
        assert_close(flat(R.diagonal()), e.gauss_newton.diagonal(), rtol)
    return J


def squares(*outputs: Tensor) -> Tensor:
    return sum(F.mse_loss(z, torch.ones_like(z), reduction="sum") for z in outputs)


def by_functions(model: nn.Module, x: Tensor) -> Reference:
    """The matrices of `squares(model(x))` in the trainable parameters, by torch.func."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        return functional_call(model, (params, {n: b.clone() for n, b in buffers.items()}), (x,)).reshape(-1)

    found = jacrev(outputs)(trainable)
    J = torch.cat([found[name].flatten(1) for name in trainable], dim=1)
    z = outputs(trainable)
    B = hessian(squares)(z)
    slope = 2 * (z - 1)
    return Reference(squares(z), J.T @ slope, J, B, J.T @ B @ J)


def model_agrees(model: nn.Module, x: Tensor, functional: bool = True, **tolerances: float) -> LayerJacobian:
    model = model.double()
    e = by_functions(model, x) if functional else dense_reference(list(model.parameters()), lambda: [model(x)], squares)
    torch.manual_seed(0)
    tape = tn.record(lambda: squares(model(x)), [p for p in model.parameters() if p.requires_grad])
    return agrees(tape, e, **tolerances)


# the zoo

WHOLE = """mlp mlp-dropout one-sample cnn-eval cnn-groupnorm depthwise conv1d conv3d conv-transpose embedding
 module-twice residual checkpoint compiled frozen-and-unused some-parameters reversed-parameters two-losses accumulated
 two-losses-of-one-output loss-on-a-hidden-layer different-batches custom-loss """
IN_PART = " unbatched norms batchnorm1d cnn-batchnorm-dropout weight-norm tied-weights gpt functional bilinear lstm "


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    p, same = ZOO[name](DOUBLE), ZOO[name](DOUBLE)
    torch.manual_seed(0)
    tape = tn.record(p.closure, p.params)
    J = agrees(tape, dense_reference(same.params, same.outputs, same.loss), p.rtol)
    assert 0 <= J.coverage <= J.expected_coverage <= 1
    assert f"{J.coverage:.0%}" in J.path
    if name in WHOLE.split():
        assert J.coverage == 1
    if name in IN_PART.split():
        assert J.coverage < 1


# layers: every way to call them

_PADDINGS = {"0": 0, "1": 1, "each": (2, 1, 0), "same": "same", "valid": "valid"}
CONVOLUTIONS = [
    (dims, kernel, stride, padding, dilation, groups)
    for dims, kernel, stride, padding, dilation, groups in itertools.product(
        (1, 2, 3), (1, 2, 3), (1, 2), _PADDINGS, (1, 2), (1, 2, 4)
    )
    if not (padding == "same" and stride > 1)
]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(dims, groups):
    """All combinations for one dimension, a third of them for more."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    chosen = [c for c in CONVOLUTIONS if c[0] == dims and c[-1] == groups]
    size = (6, 5, 5)[:dims]
    for i, (_, kernel, stride, padding, dilation, _) in enumerate(chosen):
        if dims > 1 and i % 4 != groups % 4:
            continue
        pad = _PADDINGS[padding]
        layer = kind(4, 4, kernel, stride, pad[:dims] if isinstance(pad, tuple) else pad, dilation, groups, i % 3 > 0)
        model = nn.Sequential(layer, nn.Flatten(1), *([nn.Tanh(), nn.LazyLinear(2)] if dims > 1 else []))
        x = uniform(2, 4, *size).double()
        model.double()(x)
        assert model_agrees(model, x).coverage == 1


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 4, 4)),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 2, 5)),
    "replicate same": (lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="replicate"), (2, 2, 4, 4)),
    "zeros by a module": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 3, 2)), (2, 2, 3, 3)),
    "uneven": (lambda: nn.Conv2d(2, 3, (2, 3), (2, 1), padding=(0, 2), dilation=(1, 2)), (2, 2, 5, 6)),
    "depthwise with multiplier": (lambda: nn.Conv2d(2, 6, 3, groups=2), (2, 2, 4, 4)),
    "more outputs than places": (lambda: nn.Conv2d(1, 5, 4), (2, 1, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2, padding=1), (2, 2, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 4, 3, 2, output_padding=1, groups=2, dilation=2), (2, 2, 2, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(1, 2, 2, bias=False), (2, 1, 2, 2, 1)),
    "linear": (lambda: nn.Linear(3, 2, bias=False), (4, 3)),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), (2, 4, 3)),
    "linear with pooled outputs": (lambda: nn.Sequential(nn.Linear(3, 6), nn.MaxPool1d(2), nn.ReLU()), (4, 3)),
    "linear on images": (lambda: nn.Linear(3, 2), (2, 2, 2, 3)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (3, 3)),
    "layer norm of two dims": (lambda: nn.LayerNorm((2, 3)), (3, 4, 2, 3)),
    "layer norm without bias": (lambda: nn.LayerNorm(3, bias=False), (4, 3)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4)), (2, 3, 3)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU()), (3, 2, 3, 3)),
    "instance norm as group norm": (lambda: nn.GroupNorm(4, 4), (3, 4, 2)),
    "batch norm first": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), (5, 3)),
    "batch norm alone": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "batch norm, no statistics": (lambda: nn.BatchNorm3d(2, track_running_stats=False), (3, 2, 2, 1, 2)),
    "batch norm in eval": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), (5, 3)),
    "batch norm on sequences": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "one sample": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (1, 3)),
    "one output": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), (4, 3)),
    "one of everything": (lambda: nn.Linear(1, 1), (1, 1)),
}
NOT_BY_SAMPLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 3), (3,)),
    "convolution": (lambda: nn.Conv2d(3, 3, 2), (3, 4, 4)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 3, 2), (3, 2, 2)),
    "layer norm": (lambda: nn.LayerNorm(3), (3,)),
    "layer norm over the batch": (lambda: nn.LayerNorm((4, 3)), (4, 3)),
    "rms norm over the batch": (lambda: nn.RMSNorm((4, 3)), (4, 3)),
}


def parts_of(name: str) -> list[str | None]:
    """What can be trained: all, the weights alone, the biases alone."""
    names = [n for n, _ in LAYERS[name][0]().named_parameters()]
    return [None, *(part for part in ("weight", "bias") if any(n.endswith(part) for n in names))]


@pytest.mark.parametrize(("name", "only"), [(name, only) for name in LAYERS for only in parts_of(name)])
def test_layers(name, only):
    """Also with the weights alone or the biases alone trained."""
    make, shape = LAYERS[name]
    model = make()
    for parameter_name, p in model.named_parameters():
        p.requires_grad_(only is None or parameter_name.endswith(only))
        torch.nn.init.normal_(p)
    assert model_agrees(model, uniform(*shape).double()).coverage == 1


@pytest.mark.parametrize("name", NOT_BY_SAMPLE)
def test_input_without_a_sample_dimension(name):
    """The first dimension is another one although it has the size of the output's first."""
    make, shape = NOT_BY_SAMPLE[name]
    assert model_agrees(make(), uniform(*shape).double()).coverage == 0


# what follows a layer

FOLLOWING = {
    "relu and max-pool": [nn.ReLU(), nn.MaxPool2d(2)],
    "relu in place": [nn.ReLU(inplace=True), nn.MaxPool2d(2)],
    "overlapping max-pool": [nn.MaxPool2d(3, stride=2)],
    "dilated max-pool": [nn.Tanh(), nn.MaxPool2d(2, dilation=2)],
    "ceil mode": [nn.MaxPool2d(4, ceil_mode=True, padding=1), nn.ELU()],
    "average": [nn.AvgPool2d(2), nn.Tanh()],
    "overlapping average": [nn.AvgPool2d(3, stride=2, padding=1)],
    "adaptive average": [nn.AdaptiveAvgPool2d(2)],
    "adaptive max": [nn.LeakyReLU(1e-7), nn.AdaptiveMaxPool2d((1, 2))],
    "max-pool twice": [nn.MaxPool2d(2), nn.Softplus(), nn.MaxPool2d(2)],
    "dropout": [nn.Dropout(0.5), nn.MaxPool2d(2)],
    "channels dropped": [nn.Dropout2d(0.5)],
    "softmax": [nn.Softmax(1)],
    "global norm": [nn.LayerNorm((3, 5, 5), elementwise_affine=False), nn.MaxPool2d(5)],
    "batch norm": [nn.BatchNorm2d(3, affine=False), nn.MaxPool2d(5)],
    "unfold": [nn.Unfold(3)],
    "shuffle": [nn.ChannelShuffle(3), nn.AvgPool2d(5)],
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_what_follows_a_layer(name):
    x = uniform(3, 2, 6, 6).double()
    model = nn.Sequential(nn.Conv2d(2, 3, 2), *FOLLOWING[name], nn.Flatten(), nn.LazyLinear(2))
    model.double()(x)
    coverage = model_agrees(model, x).coverage
    assert coverage < 1 if name == "batch norm" else coverage == 1


def _pooled_over_time(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.cat([parts[0](x).relu().mean(1), parts[0](x.sin()).amax(1)], dim=1)


def _dense_connections(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    a = parts[0](x)
    b = parts[1](a.relu())
    return torch.cat([a, b, a * b], dim=1)


def _split(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    a, b, c = parts[0](x).chunk(3, dim=1)
    d, e = torch.stack([a * b, c]).unbind()
    return torch.cat([d, e.split(1, dim=1)[1], torch.sort(b, dim=1).values], dim=1)


def _topk(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return parts[0](x).topk(2, dim=1).values ** 2


def _mean_removed(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    h = parts[0](x)
    return parts[1](torch.tanh(h - h.mean(0)))


def _neighbours(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    h = parts[0](x)
    return parts[1](torch.tanh(h) + 1e-4 * h.roll(1, 0))


def _reversed_batch(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return F.max_pool1d(parts[0](x).flip(0)[:, None], 2)[:, 0]


def _mapped(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Weights that are made of a parameter, beside the parameter itself."""
    w = parts[0].weight
    return parts[0](x) + F.linear(x, w.exp()) + F.linear(x, 2 * w.T.T, parts[0].bias)


def _long_chain(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    w = parts[0].weight
    for _ in range(1200):
        w = w * 1.0
    return F.linear(x, w, parts[0].bias)


def _tied(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return F.linear(parts[1](torch.tanh(parts[0](x))).tanh(), parts[0].weight, parts[0].bias)


def _checkpointed(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return parts[1](checkpoint(lambda y: F.dropout(parts[0](y), 0.4).relu(), x, use_reentrant=False))


def _of_a_slice(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return F.linear(x.mT.contiguous().mT, parts[0].weight[:, :3], parts[0].bias)


def _written_in_place(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    h = parts[0](x)
    h[:, 0] = 1.0
    h[:, 1:] *= h[:, :1].detach() + 2
    return parts[1](h.relu_())


def _experts(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The second expert gets no sample, the first one some."""
    chosen = torch.arange(len(x)) < 2
    z = x.new_zeros(len(x), 3).index_put((chosen,), parts[0](x[chosen]))
    return z + parts[1](x[:0]).sum(0)


WIRINGS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, int], ...], tuple[int, ...], bool]] = {
    "pooled over time": (_pooled_over_time, ((3, 4),), (2, 5, 3), True),
    "dense connections": (_dense_connections, ((3, 3), (3, 3)), (4, 3), True),
    "split": (_split, ((3, 6),), (4, 3), True),
    "top k": (_topk, ((3, 6),), (4, 3), True),
    "mean removed": (_mean_removed, ((3, 3), (3, 2)), (4, 3), False),
    "neighbours, weakly": (_neighbours, ((3, 3), (3, 2)), (4, 3), False),
    "reversed batch": (_reversed_batch, ((3, 4),), (4, 3), False),
    "mapped weights": (_mapped, ((3, 3),), (4, 3), False),
    "long chain": (_long_chain, ((3, 3),), (4, 3), False),
    "tied": (_tied, ((3, 3), (3, 3)), (4, 3), True),
    "checkpoint": (_checkpointed, ((3, 4), (4, 2)), (4, 3), True),
    "slice of a weight": (_of_a_slice, ((5, 3),), (4, 3), False),
    "written in place": (_written_in_place, ((3, 4), (4, 2)), (4, 3), True),
    "experts": (_experts, ((3, 3), (3, 3)), (4, 3), False),
}


class Wired(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.parts, x)


@pytest.mark.parametrize("name", WIRINGS)
def test_wirings(name):
    function, sizes, shape, whole = WIRINGS[name]
    model = Wired(function, *(nn.Linear(*s) for s in sizes))
    J = model_agrees(model, uniform(*shape).double(), functional=name != "checkpoint")
    assert J.coverage == 1 if whole else J.coverage < 1


def _two_layers(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return parts[1](torch.tanh(parts[0](x)))


def _factors_between(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    return parts[1](torch.tanh(parts[0](x) * parts[0].bias) * parts[1].bias[:1]) * parts[1].bias


@pytest.mark.parametrize("forward", [_two_layers, _factors_between])
@pytest.mark.parametrize("frozen", [(2, 3), (2,), (3,), (1, 2), (0, 1)])
def test_frozen_parameters(forward, frozen):
    """Zeros for them in every form, by layer factors and by a replay of the closure."""
    torch.manual_seed(0)
    model = Wired(forward, nn.Linear(3, 4), nn.Linear(4, 2)).double()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i not in frozen)
    params, x, y = list(model.parameters()), uniform(6, 3).double(), integers(2, 6)
    expected = dense_reference(params, lambda: [model(x)], lambda z: F.cross_entropy(z, y))
    G = expected.gauss_newton
    tape = tn.record(lambda: F.cross_entropy(model(x), y), params)
    agrees(tape, expected)
    A = tn.GaussNewton(tape)
    assert A.can_factor()
    assert_close(A.to_dense(), G)
    assert_close(flat(A.diagonal().value), G.diagonal())
    solution = torch.linalg.solve(G + 0.1 * torch.eye(len(G)).double(), -expected.gradient)
    for solver in (tn.Direct(), tn.Dual()):
        assert_close(flat(solver.solve(A + 0.1, tape.descent).solution), solution, 1e-9)
    assert_close(flat(tn.EmpiricalFisher(tape).diagonal().value), tn.EmpiricalFisher(tape).to_dense().diagonal())
    live = flat([torch.full_like(p, p.requires_grad) for p in params]) > 0
    assert not tn.EmpiricalFisher(tape).to_dense()[~live].any()
    kfac = tn.KFAC()
    kfac.update(tape)
    v = random(len(G), seed=4) * ~live
    assert_close(kfac.inverse(0.1) @ v, v / 0.1)


def test_weight_norm_covers_the_bias_alone():
    assert model_agrees(weight_norm(nn.Linear(3, 2)), uniform(4, 3).double(), functional=False).coverage == 2 / 10


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embeddings(padding_idx):
    """Tokens several times in a sample, rows that are never used, a padding row; tied with the output layer."""
    embedding = nn.Embedding(6, 3, padding_idx=padding_idx).double()
    tokens = torch.tensor([[0, 1, 1, 5], [2, 0, 5, 2]])

    def outputs(tied: bool) -> Tensor:
        h = torch.tanh(embedding(tokens).cumsum(1))
        return F.linear(h, embedding.weight) if tied else h.mean(1)

    for tied in (False, True):
        e = dense_reference([embedding.weight], lambda tied=tied: [outputs(tied)], squares)
        tape = tn.record(lambda tied=tied: squares(outputs(tied)), [embedding.weight])
        assert agrees(tape, e).coverage == 1


def test_positions_as_many_as_samples():
    """The embedding of positions is called on T positions, not on N samples; here N = T."""
    table, head = nn.Embedding(4, 3).double(), nn.Linear(3, 2).double()
    x, params = uniform(4, 4, 3).double(), [*table.parameters(), *head.parameters()]

    def outputs() -> Tensor:
        return head((x + table(torch.arange(4))).tanh()).mean(1)

    J = agrees(tn.record(lambda: squares(outputs()), params), dense_reference(params, lambda: [outputs()], squares))
    assert J.coverage == 8 / 20


def _closure(name: str) -> tuple[list[Tensor], Callable[[], Sequence[Tensor]], Callable[..., Tensor]]:
    a, b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    x, params = uniform(4, 3).double(), [*a.parameters(), *b.parameters()]

    def net(x: Tensor) -> Tensor:
        return b(torch.tanh(a(x)))

    def slope() -> Sequence[Tensor]:
        y = x.clone().requires_grad_()
        z = net(y)
        (g,) = torch.autograd.grad(z.square().sum(), y, create_graph=True)
        return [z, g]

    def two_terms() -> Sequence[Tensor]:
        return [net(x), net(x[:3].sin())]

    return {
        "derivative inside": (params, slope, squares),
        "middle and end": (params, lambda: [(h := a(x)).relu(), b(h.relu())], squares),
        "layer as output and on": (params, lambda: [(h := a(x)), b(h.tanh())], squares),
        "batches": (params, two_terms, squares),
        "no samples": (params, lambda: [net(x), net(x[:0])], squares),
        "same batch reversed": (params, lambda: [(h := a(x)).sin(), b(h.flip(0))], squares),
        "vector of outputs": (params, lambda: [net(x)[:, 0], net(x)[:, 1]], squares),
        "scalar output": (params, lambda: [net(x), net(x).mean()], squares),
        "contrastive": (params, lambda: [net(x)], lambda z: F.mse_loss(z @ z.T, torch.eye(4).double())),
    }[name]


@pytest.mark.parametrize(
    ("name", "coverage"),
    [
        ("derivative inside", None),
        ("middle and end", 1),
        ("layer as output and on", 1),
        ("batches", 1),
        ("no samples", 1),
        ("same batch reversed", 10 / 26),
        ("vector of outputs", 1),
        ("scalar output", 0),
    ],
)
def test_several_outputs(name, coverage):
    params, outputs, loss = _closure(name)
    J = agrees(tn.record(lambda: loss(*outputs()), params), dense_reference(params, outputs, loss))
    assert coverage is None or J.coverage == coverage


def test_a_penalty_inside_the_loss():
    """A parameter that the loss meets beside the outputs is no less explicit for J."""
    layer, x = nn.Linear(3, 2).double(), uniform(4, 3).double()
    params = list(layer.parameters())

    def closure() -> Tensor:
        return squares(layer(x)) + 0.1 * layer.weight.square().sum()

    tape = tn.record(closure, params)
    J = agrees(tape, dense_reference(params, lambda: [layer(x)], squares))
    assert J.coverage == 1
    assert LayerRows(J).preimage(tape.descent) is None


@pytest.mark.parametrize("kind", ["channels last", "weights too", "transposed", "expanded"])
def test_memory_formats(kind):
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Softplus(), nn.Conv2d(2, 2, 2))
    x = uniform(3, 2, 4, 4)
    if kind == "transposed":
        x = x.transpose(2, 3)
    elif kind == "expanded":
        x = x[:, :1].expand(3, 2, 4, 4)
    else:
        x = x.to(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last) if kind == "weights too" else model
    assert model_agrees(model, x.double()).coverage == 1


def test_little_memory():
    """Layers that do not fit go by double backward; at last all of them."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    found = [model_agrees(model, uniform(4, 3).double(), max_bytes=b).coverage for b in (1e9, 900, 300, 1)]
    assert found[0] == 1
    assert found == sorted(found, reverse=True)
    assert 0 < found[2] < found[0]
    assert found[-1] == 0


def test_autocast_is_left_to_autograd():
    model, x = nn.Linear(3, 2), uniform(4, 3)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(model(x).float(), torch.zeros(4, 2))

    tape = tn.record(closure, list(model.parameters()))
    v = random(8).float()
    assert LayerJacobian(tape).coverage == 0
    assert torch.equal(tn.GaussNewton(tape, LayerJacobian(tape)) @ v, tn.GaussNewton(tape) @ v)


@pytest.mark.parametrize("wide", [False, True])
def test_float32(wide):
    """Also with a cast to float64 between the layer and the cut."""
    model, x = nn.Linear(3, 8), uniform(5, 3)
    params = list(model.parameters())

    def outputs() -> Tensor:
        z = model(x).double() if wide else model(x)
        return F.max_pool1d(z[:, None], 2)[:, 0]

    tape = tn.record(lambda: squares(outputs()), params)
    assert agrees(tape, dense_reference(params, lambda: [outputs()], squares), 1e-5).coverage == 1


def test_nearly_the_same_for_all_samples():
    """tanh' differs from 1 by 1e-5: cotangents that are almost, but not, one matrix for all samples."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3 if p.shape[-1] == 3 else 0.1)
    assert model_agrees(model, uniform(5, 3).double()).coverage == 1


# the cut


def cut_of(following: Callable[[Tensor], Tensor], s: Tensor) -> Cut:
    """The cut of an identity layer with output s."""
    layer = nn.Linear(s.shape[-1], s.shape[-1]).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(s.shape[-1]))
        layer.bias.zero_()
    tape = tn.record(lambda: squares(following(layer(s))), list(layer.parameters()))
    (call,) = tape.layer_calls
    users = Users(edge for term in tape.terms for edge in term.edges)
    agrees(tape, dense_reference(tape.params, lambda: [following(layer(s))], squares))
    return find_cut(call.edge, call.output_shape, users, tape.sizes, tape.params[0])


def _pool(s: Tensor, size: int = 2, stride: int | None = None) -> Tensor:
    return F.max_pool1d(s[:, None], size, stride)[:, 0]


def _two_consumers(s: Tensor) -> Tensor:
    return _pool(s) * s.sum(1, keepdim=True)


def _taken_midway(s: Tensor) -> Tensor:
    r = s.relu()
    return torch.cat([_pool(r), r], dim=1)


@pytest.mark.parametrize(
    ("following", "entries"),
    [
        (lambda s: _pool(s.relu()).sin(), 16),
        (lambda s: _pool(_pool(s.tanh())).sin(), 8),
        (lambda s: s[:, ::2].exp(), 16),
        (lambda s: _pool(s).flip(1).exp(), 16),
        (lambda s: s.chunk(2, dim=1)[0].exp(), 16),
        (lambda s: F.avg_pool1d(s[:, None], 2)[:, 0].sin(), 32),
        (lambda s: F.avg_pool1d(s[:, None], 3, 2)[:, 0].sin(), 32),
        (lambda s: F.max_pool1d(s[:, None] * 0, 2)[:, 0].cos(), 16),
        (lambda s: (s * 0).relu()[:, :2].cos(), 8),
        (_two_consumers, 32),
        (_taken_midway, 32),
        (lambda s: s.flip(0)[:, :3], 32),
        (lambda s: s.sum(1), 32),
        (lambda s: (s - s.mean(0))[:, :2], 32),
    ],
)
def test_cut(following, entries):
    """Selections are found, and nothing else is taken for one."""
    cut = cut_of(following, uniform(4, 8).double())
    assert cut.shape.numel() == entries
    assert (cut.index is None) == (entries == 32)


@pytest.mark.parametrize("values", [[0.0] * 8, [1.0, 1, 2, 2, 3, 3, 4, 4], [-1.0] * 8])
def test_cut_with_ties_and_dead_units(values):
    s = torch.tensor([values, values[::-1]]).double()
    cut = cut_of(lambda s: _pool(s.relu()), s)
    assert cut.shape.numel() == 8


def test_cut_is_refused_for_a_small_overlap():
    """One entry of s that two places of t take, with a slope of 1e-7 beside others of 1."""
    s = torch.tensor([[5.0, 0, 0, 0, 0, 9, 0, 0], [-1, -1, -1e-3, -1, -1, -1, -1, -1]]).double()
    cut = cut_of(lambda s: _pool(F.leaky_relu(s, 1e-7), 3, 2), s)
    assert cut.index is None


def test_memory_is_given_back_at_once():
    """No reference cycle keeps factors or the graph until the collector runs."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))
    x, y = uniform(4, 1, 4, 4), integers(3, 4)
    gc.collect()
    gc.disable()
    try:
        tape = tn.record(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
        A = tn.GaussNewton(tape, LayerJacobian(tape))
        result = tn.Dual().solve(A + 0.1, tape.descent)
        again = result.shifted(0.2).reuse(result.solution)
        alive = [weakref.ref(o) for o in (tape, A, A.jacobian, A.factored()[0], A.factored()[0].factors)]
        alive += [weakref.ref(f.cotangents) for f in A.factored()[0].factors.factors]
        assert len(again) == 4
        del tape, A, result, again
        assert not any(r() is not None for r in alive)
    finally:
        gc.enable()


def test_rows_refuse_what_is_not_by_sample():
    params, outputs, loss = _closure("scalar output")
    with pytest.raises(NotPerSampleError, match="sample dimension"):
        LayerRows(LayerJacobian(tn.record(lambda: loss(*outputs()), params)))
    model, x = Wired(_mean_removed, nn.Linear(3, 3), nn.Linear(3, 2)).double(), uniform(4, 3).double()
    R = LayerRows(LayerJacobian(tn.record(lambda: squares(model(x)), list(model.parameters()))))
    for form in (R.rows, lambda: R.gram(DOUBLE)):
        with pytest.raises(NotPerSampleError, match="without explicit factors"):
            form()
    assert isinstance(R, factor.WeightedRows)


def test_no_samples_at_all():
    model, x = nn.Linear(3, 2).double(), uniform(4, 3).double()
    tape = tn.record(lambda: squares(model(x[:0])), list(model.parameters()))
    A = tn.GaussNewton(tape, LayerJacobian(tape))
    assert not (A @ torch.ones(8).double()).any()
    assert not A.to_dense().any()
    assert tn.Auto().solve(A + 1, tape.descent).status is tn.Status.CONVERGED
