"""The Hessian by the complex step: on the zoo, as an operator, and what it refuses."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, derivative
from torch import Tensor, nn
from zoo import ZOO, Problem, integers, uniform

import torchnewton as tn

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # of kl_div

IN_FLOAT32 = ("autocast", "hugging-face-gpt2-own-loss")
INEXACT_REFERENCE = ("binary_cross_entropy-", "probabilities-without-sigmoid")  # its second derivative adds 1e-12


def random(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def double_backward(p: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """∇f and Hv in plain autograd, from f = ℓ(z) taken apart by hand."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = p.loss(*p.outputs())
    live = [q for q in p.params if q.requires_grad]
    found = iter(torch.autograd.grad(loss, live, create_graph=True, allow_unused=True))
    gradient = [next(found) if q.requires_grad else None for q in p.params]
    full = [torch.zeros_like(q) if g is None else g for q, g in zip(p.params, gradient, strict=True)]
    flat = torch.cat([g.reshape(-1) for g in full])
    return flat.detach(), derivative(flat @ v, p.params)


def by_hand_is_the_closure(name: str) -> bool:
    """Not where ℓ(z) by hand is f to first order only; PyTorch's second derivative of the weight norm is wrong."""
    return name not in ("root-of-a-loss", "focal", "weight-norm") and "image-soft" not in name


def operator(name: str, h: float, dtype: torch.dtype = torch.float64) -> tuple[Problem, tn.ComplexStepHessian]:
    p = ZOO[name](dtype)
    torch.manual_seed(0)
    return p, tn.ComplexStepHessian(p.closure, p.params, h)


def reference(name: str, v: Tensor, dtype: torch.dtype) -> Tensor:
    p = ZOO[name](dtype)
    if by_hand_is_the_closure(name) and dtype == torch.float64:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return double_backward(p, v)[1]
    torch.manual_seed(0)
    return (tn.Hessian(tn.record(p.closure, p.params)) @ v).double()


@pytest.mark.parametrize("name", ZOO)
def test_products_of_the_zoo(name):
    """Everything the recording understands, at the steps the issue asks for."""
    low = name in IN_FLOAT32
    rtol = 1e-5 if low else 1e-11 if name.startswith(INEXACT_REFERENCE) else 1e-12
    for h in (1e-8, 1e-20, 1e-30 if low else 1e-100):
        _, H = operator(name, h)
        v = random(H.shape[0], 1)
        if h == 1e-8:
            expected = reference(name, v, torch.float64)
        tolerance = 2e-2 if name == "autocast" else rtol
        assert_close(H @ v, expected, tolerance)
        gradient = torch.cat([g.reshape(-1) for g in H.gradient])
        assert H.directional_derivative == pytest.approx(float(gradient @ v), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "autocast"])
def test_products_of_the_zoo_in_float32(name):
    for h in (1e-8, 1e-20, 1e-30):
        _, H = operator(name, h, torch.float32)
        v = random(H.shape[0], 1, torch.float32)
        if h == 1e-8:
            expected = reference(name, v, torch.float32)
        product = H @ v
        assert product.dtype == torch.float32
        assert_close(product, expected, 1e-5)


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, uniform(5, 3).double(), integers(3, 5)


def test_a_hand_computed_case():
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    H = tn.ComplexStepHessian(lambda: theta[0] ** 2 * theta[1], [theta])
    assert H.to_dense().tolist() == [[4.0, 2.0], [2.0, 0.0]]
    assert H.is_symmetric
    assert not H.is_positive_semidefinite
    product = H @ [torch.tensor([1.0, -1.0], dtype=torch.float64)]
    assert product[0].tolist() == [2.0, 2.0]
    assert H.directional_derivative == 3.0
    assert H.loss == 2.0


def test_powers_at_zero():
    """xⁿ for n = 0, 1, 2, where autograd has NaN for the first."""
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    H = tn.ComplexStepHessian(lambda: (theta ** torch.arange(3.0)).sum(), [theta])
    assert torch.equal(H.to_dense(), torch.diag(torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)))


def test_it_is_symmetric_linear_and_an_operator():
    model, x, y = problem()
    H = tn.ComplexStepHessian(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
    dense = H.to_dense()
    assert_close(dense, dense.T, 1e-13)
    u, v = random(H.shape[0], 0), random(H.shape[0], 1)
    assert_close(H @ (u + 1e6 * v), dense @ (u + 1e6 * v), 1e-12)
    assert_close((H + 0.5) @ v, dense @ v + 0.5 * v, 1e-12)
    assert_close(H @ (1e-150 * v), 1e-150 * (dense @ v), 1e-12)
    assert (H @ torch.zeros_like(v)).tolist() == [0.0] * len(v)
    assert H.directional_derivative == 0.0


def test_nothing_is_left_changed():
    """Buffers, random state, gradients, and the parameters' data."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x, y = uniform(5, 3).double(), integers(3, 5)

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    state = torch.get_rng_state()
    H = tn.ComplexStepHessian(closure, model.parameters())
    first = H @ random(H.shape[0], 0)
    torch.rand(3)
    assert torch.equal(first, H @ random(H.shape[0], 0))
    torch.set_rng_state(state)
    H @ random(H.shape[0], 0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


def test_it_stays_at_the_point_of_its_construction():
    model, x, y = problem()
    params = list(model.parameters())
    tape = tn.record(lambda: F.cross_entropy(model(x), y), params)
    H = tn.ComplexStepHessian.of(tape)
    v = random(H.shape[0], 0)
    before = H @ v
    assert_close(before, tn.Hessian(tape) @ v, 1e-12)
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
    assert torch.equal(H @ v, before)


class Centred(nn.Module):
    """A layer around the running mean of its inputs, which it moves before it reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.mean(0), 0.5)
        return torch.tanh(self.linear(x - self.mean))


def test_products_see_the_buffers_of_the_construction(rules):
    """Also where the forward pass reads what it moves, and where somebody changes them later."""
    tn.complex_step_rule(Cube)(lambda z: z * z * z)  # which is checked by a difference of gradients
    torch.manual_seed(1)
    model = nn.Sequential(Centred(), nn.BatchNorm1d(3)).double()
    model[1].eval()
    x, y = uniform(5, 4).double(), integers(3, 5)
    params = list(model.parameters())
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def closure() -> Tensor:
        return F.cross_entropy(Cube.apply(model(x)), y)

    tape = tn.record(closure, params)
    v = random(sum(p.numel() for p in params), 0)
    expected = tn.Hessian(tape) @ v
    operators = [tn.ComplexStepHessian.of(tape)]
    model.load_state_dict(start)
    operators.append(tn.ComplexStepHessian(closure, params))
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(1)
    for H in operators:
        assert_close(H @ v, expected, 1e-12)


class Cube(torch.autograd.Function):
    """A kernel of the user's own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@pytest.fixture
def rules():
    """Forget the rules of a test."""
    from torchnewton.curvature.complex_step import pair

    before = dict(pair.USER_RULES)
    yield
    pair.USER_RULES.clear()
    pair.USER_RULES.update(before)
    pair._found.clear()


THETA = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


def of(function, dtype: torch.dtype = torch.float64):
    theta = THETA.to(dtype).clone().requires_grad_()
    return lambda h=1e-20: tn.ComplexStepHessian(lambda: function(theta).sum(), [theta], h)


def test_a_function_without_a_rule_is_named_with_the_way_out(rules):
    with pytest.raises(tn.RecordError, match=r"no rule for .*i0") as raised:
        of(torch.special.i0)()
    assert "@tn.complex_step_rule" in str(raised.value)
    with pytest.raises(tn.RecordError, match=r"no rule for .*Cube"):
        of(lambda x: Cube.apply(x))()
    for what, function in {
        "mode='max'": lambda x: F.embedding_bag(torch.tensor([[0, 1]]), x[:, None], mode="max"),
        "ord='nuc'": lambda x: torch.linalg.matrix_norm(x[:, None], "nuc"),
        "ord=1": lambda x: torch.linalg.norm(x[:, None], 1),
    }.items():
        with pytest.raises(tn.RecordError, match=f"{what}.*tn.Hessian"):
            of(function)()
    with pytest.raises(tn.RecordError, match=r"no rule for .*eigvalsh"):
        of(lambda x: torch.linalg.eigvalsh(torch.outer(x, x)))()


def test_a_rule_of_ones_own(rules):
    @tn.complex_step_rule(torch.special.i0)
    def i0(z):
        return tn.ComplexPair(torch.special.i0(z.re), torch.special.i1(z.re) * z.im)

    @tn.complex_step_rule(Cube)
    def cube(z):
        return z * z * z

    H = of(lambda x: Cube.apply(x) + torch.exp(x).square())()
    assert_close(H.to_dense(), torch.diag(6 * THETA + 4 * torch.exp(2 * THETA)), 1e-12)
    H = of(torch.special.i0)()
    second = torch.special.i0(THETA) - torch.special.i1(THETA) / THETA
    assert_close(H.to_dense(), torch.diag(second), 1e-12)


def test_a_wrong_rule_is_refused(rules):
    @tn.complex_step_rule(torch.special.i0)
    def wrong(z):
        return tn.ComplexPair(torch.special.i0(z.re), z.im)

    with pytest.raises(tn.RecordError, match="slope"):
        of(torch.special.i0)()


def test_a_rule_that_autograd_cannot_follow_is_refused(rules):
    @tn.complex_step_rule(torch.special.i0)
    def detached(z):
        return tn.ComplexPair(torch.special.i0(z.re), torch.special.i1(z.re).detach() * z.im)

    with pytest.raises(tn.RecordError, match=r"rule of .*i0 is wrong or cannot be differentiated"):
        of(lambda x: torch.special.i0(2 * x))()


def test_what_goes_around_the_rules_is_refused():
    """A function bound before the run, a loss that is not the same in every call."""
    apply = Cube.apply
    with pytest.raises(tn.RecordError, match="on no way that the complex step can follow"):
        of(apply)()
    with pytest.raises(tn.RecordError, match=r"the slope .* goes around the rules"):
        of(lambda x: apply(x) + x)()
    calls = []

    def changing(x: Tensor) -> Tensor:
        calls.append(x)
        return len(calls) * x**2

    with pytest.raises(tn.RecordError, match="not the same in every call"):
        of(changing)()


def test_misuse_is_explained():
    for h in (0.0, -1e-20, 1.0, math.nan):
        with pytest.raises(ValueError, match="h is"):
            of(torch.exp)(h)
    with pytest.raises(ValueError, match=r"too small for torch\.float32"):
        of(torch.exp, torch.float32)(1e-100)
    with pytest.raises(tn.RecordError, match="of low precision"):
        of(lambda x: x.float().exp())(1e-100)
    with pytest.raises(tn.RecordError, match="does not depend on any"):
        of(lambda x: x.detach() + 1.0)()
    with pytest.raises(ValueError, match="not finite"):
        of(torch.exp)() @ torch.full((3,), math.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="give the function itself"):
        tn.complex_step_rule("exp")


BACKENDS = {"complex": tn.ComplexStep(), "autodiff": tn.Autodiff(), "difference": tn.FiniteDifference()}


@pytest.mark.parametrize("name", BACKENDS)
def test_directional_derivatives_of_all_backends(name):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = uniform(5, 3).double(), integers(3, 5)
    params = list(model.parameters())

    def closure() -> Tensor:
        return F.cross_entropy(model(x), y)

    before = {k: t.clone() for k, t in model.state_dict().items()}
    v = random(sum(p.numel() for p in params), 0)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    H = tn.ComplexStepHessian(closure, params)
    expected = float(torch.cat([g.reshape(-1) for g in H.gradient]) @ v), float(v @ (H @ v))
    rtol = 1e-7 if name == "difference" else 1e-12
    for order in (1, 2):
        found = tn.directional_derivative(closure, params, v, BACKENDS[name], order)
        assert found == pytest.approx(expected[order - 1], rel=rtol)
    as_list = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
    assert tn.directional_derivative(closure, params, as_list, BACKENDS[name]) == pytest.approx(expected[0], rel=rtol)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_directional_derivative_refuses_what_it_cannot_do():
    theta = THETA.clone().requires_grad_()
    with pytest.raises(ValueError, match="order is 3"):
        tn.directional_derivative(lambda: theta.sum(), [theta], THETA, order=3)
    with pytest.raises(ValueError, match="shapes"):
        tn.directional_derivative(lambda: theta.sum(), [theta], [THETA[:2]])
    assert tn.directional_derivative(lambda: theta.sum(), [theta], 0 * THETA) == 0.0


def test_packed_sequences():
    torch.manual_seed(1)
    lstm = nn.LSTM(3, 2, 2, bidirectional=True).double()
    packed = nn.utils.rnn.pack_padded_sequence(uniform(4, 3, 3).double(), torch.tensor([4, 2, 1]))

    def closure() -> Tensor:
        y, (h, c) = lstm(packed)
        return nn.utils.rnn.pad_packed_sequence(y)[0].square().mean() + (h * c).sum()

    params = list(lstm.parameters())
    H = tn.ComplexStepHessian(closure, params)
    v = random(H.shape[0], 0)
    assert_close(H @ v, tn.Hessian(tn.record(closure, params)) @ v, 1e-12)
