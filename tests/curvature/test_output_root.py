"""R with RRᵀ = B against the Hessian of the loss at the outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, flat
from torch import Tensor, nn
from zoo import integers, uniform
from zoo.losses import LOSSES

import torchnewton as tn
from torchnewton.curvature.groups import output_groups
from torchnewton.curvature.output_root import OutputRoot, output_root
from torchnewton.record import NotPerSampleError

pytestmark = pytest.mark.filterwarnings(
    "ignore:reduction. 'mean' divides the total loss:UserWarning",  # of kl_div
)

Loss = Callable[[Tensor], Tensor]


def root_of(loss: Loss, z: Tensor) -> tuple[OutputRoot, Tensor]:
    """The root of a loss of one tensor, and the slope ∂f/∂z, N × M."""
    theta = z.clone().requires_grad_()
    tape = tn.record(lambda: loss(theta * 1.0), [theta])
    (group,) = output_groups(tape)
    (term,) = tape.terms
    return output_root(term, group), group.join(term.cotangents).detach()


def blocks(loss: Loss, z: Tensor) -> Tensor:
    """B of every sample in float64, N × M × M, and nothing between samples."""
    n, m = len(z), z[0].numel()
    B = torch.autograd.functional.hessian(loss, z.double()).reshape(n, m, n, m)
    found = B.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    assert_close(torch.diag_embed(found.movedim(0, -1)).movedim(-2, 0).movedim(-1, 2), B, 1e-12)
    return found


def product(root: OutputRoot) -> Tensor:
    """RRᵀ in float64."""
    R = root.values.double()
    return torch.diag_embed(R.square()) if R.dim() == 2 else R @ R.mT


def reduced(loss: Callable[[Tensor, str], Tensor], reduction: str) -> Loss:
    def value(z: Tensor) -> Tensor:
        found = loss(z, reduction)
        return (found * torch.linspace(0.5, 1.5, found.numel(), dtype=z.dtype).view_as(found)).sum()

    return value


BY_SAMPLE = {name: entry for name, entry in LOSSES.items() if name != "cross_entropy-one"}


@pytest.mark.parametrize("name", BY_SAMPLE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_loss(name, reduction):
    """Rᵀ and R as `weigh` and `spread`, R⁺ as `solve`; a column less than classes for cross entropy."""
    shape, loss = BY_SAMPLE[name]
    z, f = uniform(*shape, low=-2, high=2).double(), reduced(loss, reduction)
    root, slope = root_of(f, z)
    B = blocks(f, z)
    n, m = slope.shape
    assert_close(product(root), B, 1e-9)
    w, rows = uniform(n, root.width).double(), uniform(n, m, 2, seed=5).double()
    R = torch.diag_embed(root.values) if root.values.dim() == 2 else root.values
    assert_close(root.spread(w), (R @ w[..., None])[..., 0])
    assert_close(root.weigh(rows), R.mT @ rows)
    if name.startswith(("cross_entropy", "nll", "kl_div")) and "log-of" not in name:
        places = m // 3
        assert root.width == (2 if len(shape) == 2 else 2 * places)
    y = root.solve(slope)
    known = torch.isfinite(y).all(1)
    if bool(known.all()) and not name.startswith(("huber", "smooth")):
        assert_close(root.spread(y), slope, 1e-9)
        assert_close(y, (torch.linalg.pinv(R) @ slope[..., None])[..., 0], 1e-6)


@pytest.mark.parametrize("classes", [2, 3, 40])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 100.0, 1e4])
@pytest.mark.parametrize("right", [True, False])
def test_cross_entropy_of_fitted_and_of_wrong_samples(classes, scale, right):
    """In float32, where most p vanish: finite, no failure, and RRᵀ exact for every sample as far as B is not zero."""
    z = scale * uniform(6, classes)
    y = z.argmax(1) if right else z.argmin(1)
    for f in (
        lambda z: F.cross_entropy(z, y),
        lambda z: F.cross_entropy(z, y, label_smoothing=0.1, reduction="sum"),
        lambda z: F.nll_loss(F.log_softmax(z, 1), y),
    ):
        root, slope = root_of(f, z)
        B = blocks(f, z)
        assert root.width == (classes - 1 if root.values.any() else classes)
        assert bool(torch.isfinite(root.values).all())
        if root.values.any():
            assert bool(torch.isfinite(root.solve(slope)).all())
        for found, expected in zip(product(root), B, strict=True):
            assert (found - expected).norm() <= 1e-15 + 1e-5 * expected.norm()  # the reference cancels to 1e-16


def test_samples_of_very_different_confidence():
    z = torch.tensor([[0.1, 0.2, -0.3], [50, -50, 0], [-50, 50, 50], [88, 0, 0], [0, 1e4, -1e4], [0, 16, 0]])
    f = lambda z: F.cross_entropy(z, torch.tensor([0, 0, 0, 0, 0, 1]))  # noqa: E731
    root, slope = root_of(f, z)
    B = blocks(f, z)
    assert_close(product(root), B, 1e-6)
    assert_close(product(root)[5], B[5], 1e-5)
    assert slope.shape == (6, 3)


def test_linear_and_constant_pieces_have_the_root_zero():
    z = uniform(4, 3).double()
    for f in (
        lambda z: tn.outputs(z).sum(),
        lambda z: F.cross_entropy(z[:, :1], torch.zeros(4).long()),
        lambda z: F.huber_loss(z, z.detach() + 5, delta=0.1),
        lambda z: F.cross_entropy(z, torch.full((4,), -100), reduction="sum"),
    ):
        root, _ = root_of(f, z)
        assert not root.values.any()


A = torch.tensor([[2.0, -1, 0], [-1, 1, 0], [0, 0, 1]]).double()
MIXING = {
    "contrastive": lambda z: torch.logsumexp((z[:, None] - z[None]).square().sum(-1).flatten(), 0),
    "mean over samples": lambda z: (z.mean(0) - 1).square().sum(),
    "softmax over samples": lambda z: torch.logsumexp(z, 0).sum(),
    "product of two": lambda z: (z[0] - z[1]).square().sum() + z.square().sum(),
}


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z: (z @ A.to(z.dtype)).square().sum(),
        lambda z: (z @ A.to(z.dtype)).square().sum() / 1e9,
        lambda z: z[:, :2].sum(1).square().sum(),
        lambda z: (z[:, 0] - z[:, 1]).square().sum(),
        lambda z: (1 + z.square().sum(1)).sqrt().sum(),
        lambda z: torch.logsumexp(z / 30, 1).sum(),
        lambda z: (z.norm(dim=1) - 1).square().sum() + 10 * z.square().sum(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_marked_losses(loss, scale, dtype):
    """Also on large outputs, whose softmax is a corner: nothing else is taken for a cross entropy."""
    z = scale * uniform(5, 3).to(dtype)
    root, _ = root_of(lambda z: loss(tn.outputs(z)), z)
    assert_close(product(root), blocks(loss, z), 1e-10 if dtype is torch.float64 else 1e-4)


@pytest.mark.parametrize("name", MIXING)
def test_losses_that_mix_samples_are_refused(name):
    with pytest.raises(NotPerSampleError, match="mixes samples"):
        root_of(lambda z: MIXING[name](tn.outputs(z)), uniform(5, 3).double())


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: z.cos().sum(),
        lambda z: (z[:, 0] * z[:, 1]).sum(),
        lambda z: -torch.logsumexp(z, 1).sum(),
        lambda z: z.square().sum() - 3 * z[:, 0].square().sum(),
    ],
)
def test_indefinite_losses_are_refused(loss):
    with pytest.raises(NotPerSampleError, match="not positive semidefinite"):
        root_of(lambda z: loss(tn.outputs(z)), uniform(5, 3).double())


LABELS = integers(3, 5)
OF_ONE_OUTPUT = {
    "two cross entropies": lambda z: F.cross_entropy(z, LABELS) + F.cross_entropy(z, LABELS.flip(0), reduction="sum"),
    "with squares": lambda z: F.cross_entropy(z, LABELS) + F.mse_loss(z, torch.zeros_like(z)),
    "weighted by sample": lambda z: F.cross_entropy(z, LABELS, reduction="none") @ torch.arange(5.0).to(z.dtype),
    "focal": lambda z: -torch.expm1(-F.cross_entropy(z, LABELS, reduction="none")).sum(),
}


@pytest.mark.parametrize("name", OF_ONE_OUTPUT)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_two_losses_of_one_output(name, scale):
    z = scale * uniform(5, 3).double()
    if name == "focal":  # B counts φ′(ℓ) ∂²ℓ/∂z² alone
        weights = torch.exp(-F.cross_entropy(z, LABELS, reduction="none"))
        B = blocks(lambda z: F.cross_entropy(z, LABELS, reduction="none") @ weights, z)
    else:
        B = blocks(OF_ONE_OUTPUT[name], z)
    root, _ = root_of(OF_ONE_OUTPUT[name], z)
    assert_close(product(root), B, 1e-9)


def test_a_joint_loss_of_several_outputs():
    z = uniform(5, 4).double()

    def joint(a: Tensor, b: Tensor) -> Tensor:
        return torch.logsumexp(torch.cat([a, b], 1), 1).sum()

    theta = z.clone().requires_grad_()
    tape = tn.record(lambda: joint(tn.outputs(theta[:, :1] * 1.0), tn.outputs(theta[:, 1:] * 1.0)), [theta])
    (group,) = output_groups(tape)
    root = output_root(tape.terms[0], group)
    assert_close(product(root), blocks(lambda z: torch.logsumexp(z, 1).sum(), z))
    assert bool(root.solve(uniform(5, 4).double()).isnan().all())


@pytest.mark.parametrize(("dtype", "weight", "rtol"), [(torch.float32, 1e5, 1e-5), (torch.float64, 1e11, 1e-10)])
@pytest.mark.parametrize("mark", [lambda z: z, tn.outputs])
def test_losses_of_very_different_scale(dtype, weight, rtol, mark):
    """The block of the smaller one is as exact as it is alone, in the root and in what is made of it."""
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2).to(dtype), nn.Linear(3, 4).to(dtype)
    x, y, labels = uniform(8, 3).to(dtype), uniform(8, 2, seed=5).to(dtype), integers(4, 8)
    params = [*a.parameters(), *b.parameters()]
    tape = tn.record(lambda: weight * F.mse_loss(mark(a(x)), y) + F.cross_entropy(mark(b(x) * 1.0), labels), params)
    (group,) = output_groups(tape)
    root = output_root(tape.terms[0], group)
    B = blocks(lambda z: F.cross_entropy(z, labels), b(x).detach())
    found = product(root)
    assert_close(found[:, 2:, 2:], B, rtol)
    assert_close(found[:, :2, :2], (weight / 8 * torch.eye(2).double()).expand(8, 2, 2), rtol)
    A = tn.GaussNewton(tape)
    alone = tn.GaussNewton(tn.record(lambda: F.cross_entropy(b(x), labels), list(b.parameters())))
    assert_close(A.to_dense()[8:, 8:], alone.to_dense(), rtol)
    v = torch.cat([torch.zeros(8), uniform(16)]).to(dtype)
    assert_close((A @ v)[8:], A.to_dense()[8:, 8:] @ v[8:].double(), rtol)
    assert_close(flat(A.diagonal().value)[8:], alone.to_dense().diagonal(), rtol)
    zeros = [torch.zeros_like(p) for p in a.parameters()]
    slope = torch.autograd.grad(F.cross_entropy(b(x), labels), list(b.parameters()))
    expected = flat(tn.Direct().solve(alone + 0.1, list(slope)).solution)
    for solver in (tn.Direct(), tn.Dual(), tn.CG(rtol=1e-12, max_iterations=200)):
        solution = solver.solve(A + 0.1, [*zeros, *slope]).solution
        assert_close(flat(solution)[8:], expected, 100 * rtol)


@pytest.mark.parametrize(("dtype", "weight", "rtol"), [(torch.float32, 1e5, 1e-5), (torch.float64, 1e11, 1e-10)])
def test_samples_of_very_different_scale(dtype, weight, rtol):
    """B of the large one is diagonal, those of the others are not."""
    z = uniform(5, 3).to(dtype)

    def loss(z: Tensor) -> Tensor:
        return weight * z[:1].square().sum() + (z[1:] @ A.to(z.dtype)).square().sum()

    root, _ = root_of(lambda z: loss(tn.outputs(z)), z)
    for found, expected in zip(product(root), blocks(loss, z), strict=True):
        assert_close(found, expected, rtol)


def test_outputs_side_by_side():
    """The first and the last output are coupled; of the others the root is known, and its inverse."""
    y = integers(3, 5)

    def loss(z: Tensor) -> Tensor:
        a, b, c, d = z.split([1, 3, 2, 1], 1)
        zeros = torch.zeros(5, 2, dtype=z.dtype)
        first = F.mse_loss(a, zeros[:, :1])
        return first + F.cross_entropy(b, y) + F.huber_loss(c, zeros, delta=2.0) + F.mse_loss(a, d)

    theta = uniform(5, 7).double().requires_grad_()
    tape = tn.record(lambda: loss(theta * 1.0), [theta])
    (group,), (term,) = output_groups(tape), tape.terms
    root = output_root(term, group)
    assert root.values.shape == (5, 7, 6)
    assert_close(product(root), blocks(loss, theta.detach()))
    s, w, rows = uniform(5, 7, seed=2).double(), uniform(5, 6).double(), uniform(5, 7, 2).double()
    assert_close(root.spread(w), (root.values @ w[..., None])[..., 0])
    assert_close(root.weigh(rows), root.values.mT @ rows)
    assert bool(root.solve(s)[:, :2].isnan().all())
    assert bool(root.solve(s)[:, 2:].isfinite().all())
    two = tn.record(lambda: F.cross_entropy(theta[:, :3] * 1.0, y) + F.mse_loss(theta[:, 3:], s[:, 3:]), [theta])
    (group,), (term,) = output_groups(two), two.terms
    root, slope = output_root(term, group), group.join(term.cotangents).detach()
    assert_close(root.spread(root.solve(slope)), slope)
