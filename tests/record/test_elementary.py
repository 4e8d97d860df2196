"""Losses written by hand: what they are split into, and the curvature they have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, flat
from torch import Tensor, nn

import torchnewton as tn

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.arange(6) % 3
SOFT = Y.softmax(1)
SIGNS = Y.sign()
Loss = Callable[[Tensor], Tensor]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def tape_of(model: nn.Module, loss: Loss) -> tn.Tape:
    params = list(model.parameters())
    tape = tn.record(lambda: loss(model(X)), params)
    assert_close(flat(tape.gradient), flat(torch.autograd.grad(loss(model(X)), params)))
    return tape


def log_probabilities(z: Tensor) -> Tensor:
    return F.log_softmax(z, 1)


def bce_by_hand(z: Tensor) -> Tensor:
    p = torch.sigmoid(z)
    return -(SOFT * p.log() + (1 - SOFT) * (1 - p).log()).mean()


def gaussian(z: Tensor) -> Tensor:
    return -torch.distributions.Normal(z, 0.5).log_prob(Y).mean()


def categorical(z: Tensor) -> Tensor:
    return -torch.distributions.Categorical(logits=z).log_prob(LABELS).mean()


# by hand, and the loss of torch that is the same
SAME: dict[str, tuple[Loss, Loss]] = {
    "power": (lambda z: ((z - Y) ** 2).mean(), lambda z: F.mse_loss(z, Y)),
    "square": (lambda z: (z - Y).square().sum(1).mean(), lambda z: 3 * F.mse_loss(z, Y)),
    "product": (lambda z: torch.mean((r := z - Y) * r), lambda z: F.mse_loss(z, Y)),
    "dot": (lambda z: (r := (z - Y).flatten()) @ r, lambda z: F.mse_loss(z, Y, reduction="sum")),
    "norm-squared": (lambda z: torch.linalg.norm(z - Y) ** 2, lambda z: F.mse_loss(z, Y, reduction="sum")),
    "norms-squared": (lambda z: (z - Y).norm(dim=1).square().mean(), lambda z: 3 * F.mse_loss(z, Y)),
    "weights": (
        lambda z: (Y.abs() * (z - Y) ** 2).mean(),
        lambda z: (Y.abs() * F.mse_loss(z, Y, reduction="none")).mean(),
    ),
    "root": (lambda z: ((z - Y) ** 2).mean().sqrt(), lambda z: F.mse_loss(z, Y).sqrt()),
    "root-power": (lambda z: ((z - Y) ** 2).mean() ** 0.5, lambda z: F.mse_loss(z, Y).sqrt()),
    "norm": (lambda z: torch.norm(z - Y), lambda z: F.mse_loss(z, Y, reduction="sum").sqrt()),
    "norms": (lambda z: (z - Y).norm(dim=1).mean(), lambda z: F.mse_loss(z, Y, reduction="none").sum(1).sqrt().mean()),
    "normal": (gaussian, lambda z: 2 * F.mse_loss(z, Y)),
    "log-softmax": (lambda z: -log_probabilities(z)[range(6), LABELS].mean(), lambda z: F.cross_entropy(z, LABELS)),
    "soft": (lambda z: -(SOFT * log_probabilities(z)).sum(1).mean(), lambda z: F.cross_entropy(z, SOFT)),
    "divergence": (
        lambda z: (SOFT * (SOFT.log() - log_probabilities(z))).sum() / 6,
        lambda z: F.kl_div(log_probabilities(z), SOFT, reduction="batchmean"),
    ),
    "log-of-softmax": (
        lambda z: -torch.log(z.softmax(1).gather(1, LABELS[:, None])).mean(),
        lambda z: F.cross_entropy(z, LABELS),
    ),
    "log-sum-exp": (
        lambda z: (z.logsumexp(1) - z[range(6), LABELS]).mean(),
        lambda z: F.cross_entropy(z, LABELS),
    ),
    "categorical": (categorical, lambda z: F.cross_entropy(z, LABELS)),
    "sigmoid": (bce_by_hand, lambda z: F.binary_cross_entropy_with_logits(z, SOFT)),
    "softplus": (lambda z: F.softplus(-SIGNS * z).mean(), lambda z: F.soft_margin_loss(z, SIGNS)),
    "log-sigmoid": (lambda z: -F.logsigmoid(SIGNS * z).mean(), lambda z: F.soft_margin_loss(z, SIGNS)),
    "counts": (
        lambda z: (z.exp() - LABELS[:, None] * z).mean(),
        lambda z: F.poisson_nll_loss(z, LABELS[:, None].expand(6, 3).double()),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_as_the_loss_of_torch(model, name):
    """The same Gauss-Newton matrix, without a word about curvature that is left out."""
    by_hand, known = (tape_of(model, loss) for loss in SAME[name])
    assert_close(tn.GaussNewton(by_hand).to_dense(), tn.GaussNewton(known).to_dense(), rtol=1e-7)
    assert not by_hand.lacks_curvature
    v = torch.linspace(-1, 1, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    assert_close(tn.GaussNewton(by_hand) @ v, tn.GaussNewton(known) @ v, rtol=1e-7)


@pytest.mark.parametrize("name", [name for name in SAME if name != "dot"])  # r has lost its samples
def test_outputs_can_be_had_again_and_by_sample(model, name):
    tape = tape_of(model, SAME[name][0])
    assert all(torch.equal(z, a) for z, a in zip(tape.outputs, tape.evaluate_outputs(), strict=True))
    G = tn.GaussNewton(tape)
    assert G.can_factor()


# losses with no counterpart: names of their parts
ROBUST: dict[str, tuple[Loss, list[str]]] = {
    "cauchy": (lambda z: torch.log(1 + (z - Y) ** 2).mean(), ["pow"]),
    "cauchy-log1p": (lambda z: torch.log1p((z - Y) ** 2).mean(), ["pow"]),
    "welsch": (lambda z: (1 - torch.exp(-((z - Y) ** 2))).mean(), ["pow"]),
    "log-cosh": (lambda z: torch.log(torch.cosh(z - Y)).mean(), ["cosh"]),
    "charbonnier": (lambda z: ((z - Y) ** 2 + 1e-3).sqrt().mean(), ["pow"]),
    "huber": (lambda z: torch.where((z - Y).abs() < 1, 0.5 * (z - Y) ** 2, (z - Y).abs() - 0.5).mean(), ["pow"]),
    "fourth": (lambda z: ((z - Y) ** 4).mean(), ["pow"]),
    "rates": (lambda z: (F.softplus(z) - LABELS[:, None] * F.softplus(z).log()).mean(), ["softplus", "log"]),
    "scaled": (lambda z: ((z[:, 0] - Y[:, 0]) ** 2 / z[:, 1].exp() + z[:, 1]).mean(), ["pow"]),
    "mean": (lambda z: (z.mean() - 1) ** 2 + ((z - Y) ** 2).mean(), ["pow", "pow"]),
    "both": (lambda z: F.mse_loss(z, Y) + 0.1 * (z**2).mean(), ["mse_loss", "pow"]),
    "energy": (lambda z: 0.5 * (z[:, 1:] ** 2).mean() - z[:, 0].mean(), ["pow"]),
}


@pytest.mark.parametrize("name", ROBUST)
def test_positive_semidefinite(model, name):
    loss, names = ROBUST[name]
    tape = tape_of(model, loss)
    assert sorted(piece.name for piece in tape.pieces) == sorted(names)
    G = tn.GaussNewton(tape)
    assert G.is_positive_semidefinite
    assert torch.linalg.eigvalsh(G.to_dense())[0] > -1e-12 * G.to_dense().norm()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: -((z - Y) ** 2).mean(),
        lambda z: (z - Y).abs().mean(),
        lambda z: (torch.distributions.Categorical(logits=z).log_prob(LABELS) * Y[:, 0]).mean(),
        lambda z: z.mean(),
        lambda z: torch.log(1 - z.softmax(1)).mean(),
        lambda z: -torch.log1p(-0.5 * z.softmax(1)).square().mean(),
        lambda z: torch.linalg.norm(z - Y, 2),  # spectral
        lambda z: z.prod(),
    ],
)
def test_not_convex(model, loss):
    tape = tape_of(model, loss)
    assert not tape.pieces
    with pytest.raises(tn.RecordError, match="no split"):
        tn.GaussNewton(tape) @ torch.ones(sum(p.numel() for p in model.parameters()))


def test_what_is_inside_of_the_network_is_no_loss():
    """A normalization and an activation by hand, in front of a layer."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
    params = [*first.parameters(), *second.parameters()]

    def closure() -> Tensor:
        h = first(X)
        h = h / (h**2).mean(1, keepdim=True).sqrt()
        return F.cross_entropy(second(F.softplus(h) * h.exp()), LABELS)

    assert [piece.name for piece in tn.record(closure, params).pieces] == ["cross_entropy"]
    with pytest.raises(tn.RecordError, match="no split"):
        tn.GaussNewton(tn.record(lambda: second(F.softplus(first(X) ** 2)).sum(), params)) @ torch.ones(43).double()


def test_penalties_are_left_to_weight_decay(model):
    """Beside a loss of outputs; alone they are what is minimized."""
    params = list(model.parameters())

    def squares() -> Tensor:
        return torch.stack([(p**2).sum() for p in params]).sum()

    tape = tn.record(lambda: ((model(X) - Y) ** 2).mean() + squares(), params)
    assert len(tape.pieces) == 1
    assert tape.lacks_curvature
    assert tn.GaussNewton(tape).can_factor()  # the penalties are not in the replay by samples
    alone = tn.record(squares, params)
    assert_close(tn.GaussNewton(alone).to_dense(), 2 * torch.eye(43, dtype=torch.float64))


def test_a_value_that_is_used_twice(model):
    """The variance of a variational autoencoder is part of the penalty and of what is decoded."""
    decoder = nn.Linear(3, 4).double()
    params = [*model.parameters(), *decoder.parameters()]

    def closure() -> Tensor:
        mean = model(X)
        variance = (0.1 * model(X + 1)).exp()
        again = decoder(mean + variance.sqrt())
        return ((again - X) ** 2).sum() - 0.5 * (1 + variance.log() - mean**2 - variance).sum()

    tape = tn.record(closure, params)
    assert_close(flat(tape.gradient), flat(torch.autograd.grad(closure(), params)))
    assert torch.linalg.eigvalsh(tn.GaussNewton(tape).to_dense())[0] > -1e-10


@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss, F.smooth_l1_loss])
def test_an_output_behind_another(model, loss):
    """A derivative by the first output would contain that by the second."""
    decoder = nn.Linear(3, 3).double()
    params = [*model.parameters(), *decoder.parameters()]

    def closure(difference: bool = False) -> Tensor:
        h = model(X)
        return ((decoder(h) - h) ** 2).mean() if difference else loss(decoder(h), h)

    tape = tn.record(closure, params)
    assert_close(flat(tape.gradient), flat(torch.autograd.grad(closure(), params)))
    with pytest.raises(tn.RecordError, match="square of their difference"):
        tape.require_split()
    tn.record(lambda: closure(True), params).require_split()


def test_a_mark_behind_another(model):
    def closure() -> Tensor:
        a = tn.outputs(model(X))
        return ((tn.outputs(a.tanh()) - a) ** 2).mean()

    with pytest.raises(tn.RecordError, match="mark one of the two"):
        tn.record(closure, list(model.parameters()))


def test_focal_loss_keeps_its_split(model):
    def focal(z: Tensor) -> Tensor:
        ce = F.cross_entropy(z, LABELS, reduction="none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()

    assert [piece.name for piece in tape_of(model, focal).pieces] == ["cross_entropy"]


def test_several_backward_calls(model):
    params = list(model.parameters())

    def closure() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part in (slice(0, 2), slice(2, 6)):
            loss = ((model(X[part]) - Y[part]) ** 2).sum() / 18
            loss.backward()
            total += loss.detach()
        return total

    tape = tn.record(closure, params)
    expected = tn.GaussNewton(tn.record(lambda: F.mse_loss(model(X), Y), params)).to_dense()
    assert_close(tn.GaussNewton(tape).to_dense(), expected)


def test_rosenbrock_is_a_sum_of_two_squares():
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = tn.Newton([x])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        loss.backward()
        return loss

    for _ in range(40):
        optimizer.step(closure)
    assert (x - 1).norm() < 1e-8
