"""The noise of the gradient in units of the curvature."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchnewton as tn
from torchnewton.curvature import noise_parts, noise_scale


@pytest.fixture
def data():
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()
    return model, torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)


def scale_of(model, loss):
    return noise_scale(tn.record(loss, list(model.parameters())), torch.Generator().manual_seed(0))


def test_squared_error_is_twice_the_loss_over_the_outputs(data):
    model, x, y = data
    expected = 2 * F.mse_loss(model(x), y).item() / 4
    assert scale_of(model, lambda: F.mse_loss(model(x), y)) == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_with_labels_from_the_model_is_one(data):
    model, _, _ = data
    x = torch.randn(20_000, 5, dtype=torch.float64)
    labels = torch.multinomial(model(x).detach().softmax(1), 1).squeeze(1)
    assert scale_of(model, lambda: F.cross_entropy(model(x), labels)) == pytest.approx(1.0, abs=0.03)


def test_cross_entropy_by_hand(data):
    model, x, _ = data
    labels = torch.arange(40) % 4
    p = model(x).detach().softmax(1)
    noise = (p - F.one_hot(labels, 4)).square().sum()
    curvature = (p - p.square()).sum()
    found = [
        noise_scale(tn.record(lambda: F.cross_entropy(model(x), labels), list(model.parameters())), generator)
        for generator in (torch.Generator().manual_seed(seed) for seed in range(200))
    ]
    assert sum(found) / 200 == pytest.approx(float(noise / curvature), rel=0.02)


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_a_factor_on_the_loss_is_one_on_the_scale(data, factor):
    model, x, y = data
    once, scaled = (scale_of(model, lambda c=c: c * F.huber_loss(model(x), y)) for c in (1.0, factor))
    assert scaled == pytest.approx(factor * once, rel=1e-9)


def test_a_sum_over_n_samples_is_n_times_a_mean(data):
    model, x, y = data
    mean = scale_of(model, lambda: F.mse_loss(model(x), y))
    assert scale_of(model, lambda: F.mse_loss(model(x), y, reduction="sum") / 4) == pytest.approx(40 * mean, rel=1e-9)


def test_class_dimension_in_the_middle(data):
    model, x, _ = data
    labels = torch.randint(4, (8, 5))
    flat = scale_of(model, lambda: F.cross_entropy(model(x), labels.flatten()))
    middle = scale_of(model, lambda: F.cross_entropy(model(x).view(8, 5, 4).movedim(2, 1), labels))
    assert middle == pytest.approx(flat, rel=0.2)  # other signs


TARGET = torch.tensor([[0, 4, 1], [2, 2, 3], [1, 0, 4], [3, 3, 2]])
KEPT = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]]).bool()
IGNORED = TARGET.masked_fill(~KEPT, -100)
WAYS = {
    "flat": lambda z: F.cross_entropy(z.flatten(0, 1), TARGET.flatten()),
    "classes second": lambda z: F.cross_entropy(z.mT, TARGET),
    "by hand": lambda z: F.cross_entropy(z.mT, TARGET, reduction="none").mean(),
    "probabilities": lambda z: F.cross_entropy(z.flatten(0, 1), F.one_hot(TARGET, 5).flatten(0, 1).double()),
    "nll of a view": lambda z: F.nll_loss(F.log_softmax(z, -1).view(-1, 5), TARGET.view(-1)),
    "nll, classes second": lambda z: F.nll_loss(F.log_softmax(z, -1).mT, TARGET),
    "kl, flat": lambda z: F.kl_div(F.log_softmax(z, -1).flatten(0, 1), F.one_hot(TARGET, 5).double().flatten(0, 1)) * 5,
    "kl": lambda z: F.kl_div(F.log_softmax(z, -1), F.one_hot(TARGET, 5).double(), reduction="batchmean") / 3,
}
KEPT_WAYS = {
    "left out": lambda z: F.cross_entropy(z[KEPT], TARGET[KEPT]),
    "ignored": lambda z: F.cross_entropy(z.flatten(0, 1), IGNORED.flatten()),
    "ignored, classes second": lambda z: F.nll_loss(F.log_softmax(z.mT, 1), IGNORED),
    "another index": lambda z: F.cross_entropy(z.mT, TARGET.masked_fill(~KEPT, -1), ignore_index=-1),
}
ONE = {
    "batch": lambda z: F.cross_entropy(z[0, :1], TARGET[0, :1]),
    "no batch": lambda z: F.cross_entropy(z[0, 0], TARGET[0, 0]),
    "nll without a batch": lambda z: F.nll_loss(F.log_softmax(z[0, 0], 0), TARGET[0, 0]),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")  # of kl_div
@pytest.mark.parametrize("ways", [WAYS, KEPT_WAYS, ONE])
def test_every_way_to_write_a_cross_entropy(ways):
    torch.manual_seed(0)
    z = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)

    def parts(loss) -> tuple[float, float]:
        tape = tn.record(lambda: loss(z), [z])
        found = [noise_parts(tape, torch.Generator().manual_seed(seed)) for seed in range(300)]
        return found[0][0], sum(trace for _, trace in found) / 300

    squares, trace = parts(next(iter(ways.values())))
    for loss in ways.values():
        found, estimate = parts(loss)
        assert found == pytest.approx(squares, rel=1e-12)
        assert estimate == pytest.approx(trace, rel=0.1)  # other signs


def test_nothing_where_nothing_is_known(data):
    model, x, _ = data
    assert scale_of(model, lambda: model(x).abs().sum()) == 0  # no split
    assert scale_of(model, lambda: F.l1_loss(model(x), torch.zeros(40, 4).double())) == 0  # no curvature
