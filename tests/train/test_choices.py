"""Models and methods by name."""

import math
from itertools import combinations

import pytest
import torch
from tasks import images, text, values

from torchnewton.train.data import load
from torchnewton.train.errors import UsageError
from torchnewton.train.figures import COLOURS
from torchnewton.train.loop import loss_function
from torchnewton.train.methods import METHODS, NAMES, Muon, default_batch_size, make_optimizer
from torchnewton.train.models import build, resolve
from torchnewton.train.simplenn import network


@pytest.mark.parametrize(
    ("spec", "data"),
    [
        *((spec, images()) for spec in ("auto", "cnn", "mlp", "mlp:5", "sigmoid-mlp", "linear")),
        ("lenet", images(28)),
        ("cnn", images(28)),
        ("cnn4", images(8)),
        ("cnn7", images(9)),
        *((spec, values()) for spec in ("auto", "mlp:7-3", "linear")),
        ("auto", text()),
    ],
)
def test_models_take_their_shapes_from_the_data(spec, data):
    model = build(spec, data)
    output = model(data.x_test)
    assert output.shape[:-1] == data.y_test.shape[: output.ndim - 1]
    assert torch.isfinite(loss_function(output, data.y_test))


def test_auto_chooses_by_the_task():
    assert resolve("auto", images()) == "cnn"
    assert resolve("auto", values()) == "sigmoid-mlp:20-20-20"
    assert resolve("auto", text()) == "transformer"
    assert resolve("mlp", values()) == "mlp:64-64"


def test_the_default_cnn_is_small(tmp_path):
    model = build("auto", load("digits", tmp_path))
    assert sum(p.numel() for p in model.parameters()) == 9930


@pytest.mark.parametrize(
    ("name", "image", "count"),
    [
        ("cnn4", (3, 32, 32), 68_106),
        ("cnn4", (1, 28, 28), 62_026),
        ("cnn7", (3, 32, 32), 198_378),
        ("vgg11", (3, 32, 32), 28_144_010),
        ("vgg16", (3, 32, 32), 33_638_218),
    ],
)
def test_the_networks_of_simplenn_have_the_published_sizes(name, image, count):
    with torch.device("meta"):
        model = network(name, image, 10)
        assert model(torch.empty(2, *image)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == count


def test_weights_of_simplenn_have_variance_two_over_fan_in():
    torch.manual_seed(0)
    layers = [m for m in network("cnn7", (3, 32, 32), 10) if hasattr(m, "weight")]
    assert len(layers) == 7
    for layer in layers:
        fan_in = layer.weight[0].numel()
        assert abs(layer.weight.var() * fan_in / 2 - 1) < 5 * (2 / layer.weight.numel()) ** 0.5
        assert not layer.bias.any()


def test_sigmoid_weights_are_standard_normal():
    weight = build("sigmoid-mlp:200-200", values())[3].weight
    assert abs(weight.std() - 1) < 0.02


def test_the_transformer_does_not_see_the_future():
    data = text()
    model = build("transformer", data)
    changed = data.x_test.clone()
    changed[:, 9:] = 0
    assert torch.allclose(model(changed)[:, :9], model(data.x_test)[:, :9], atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "data", "match"),
    [
        ("resnet", images(), "Unknown model 'resnet': choose from auto, cnn"),
        ("mlp:a", images(), "write the hidden sizes as"),
        ("mlp:5-0", images(), "write the hidden sizes as"),
        ("cnn:5", images(), "takes no sizes"),
        ("cnn", values(), "needs images"),
        ("lenet", images(), "16×16"),
        ("vgg11", images(31), "32×32"),
        ("mlp", text(), "transformer is the model for text"),
        ("transformer", images(), "transformer is the model for text"),
    ],
)
def test_a_model_that_does_not_fit_is_one_sentence(spec, data, match):
    with pytest.raises(UsageError, match=match) as error:
        build(spec, data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", [images(), values(), text()], ids=lambda data: data.name)
def test_every_method_steps_on_every_kind_of_task(name, data):
    model = build("auto", data)
    optimizer = make_optimizer(name, model, None)

    def closure():
        optimizer.zero_grad()
        loss = loss_function(model(data.x_train), data.y_train)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    for _ in range(2):
        optimizer.step(closure)
    assert float(closure().detach()) < first


def test_rates_are_for_first_order_methods_alone():
    model = build("linear", values())
    assert make_optimizer("sgd", model, 0.5).param_groups[0]["lr"] == 0.5
    assert make_optimizer("sgd", model, None).param_groups[0]["momentum"] == 0.9
    for name in ("newton", "sgn", "lbfgs"):
        with pytest.raises(UsageError, match="--lr is for adam, sgd, muon"):
            make_optimizer(name, model, 0.1)
    with pytest.raises(UsageError, match="Unknown method 'rmsprop': choose from newton, sgn"):
        make_optimizer("rmsprop", model, None)


def test_grids_have_five_rates_with_the_default_between():
    for name in ("adam", "sgd", "muon"):
        rates = METHODS[name].rates
        assert len(rates) == 5
        assert rates[0] < METHODS[name].default_lr < rates[-1]


def test_muon_takes_hidden_weights_and_adamw_the_rest():
    model = build("cnn", images())
    optimizer = Muon(model, 0.01)
    assert [tuple(p.shape) for p in optimizer._flat] == [(16, 9), (32, 144)]
    assert all(flat.data_ptr() == p.data_ptr() for flat, p in zip(optimizer._flat, optimizer._hidden, strict=True))
    model = build("auto", text())
    assert model.head.weight.data_ptr() not in {p.data_ptr() for p in Muon(model, 0.01)._flat}
    assert model.characters.weight.data_ptr() not in {p.data_ptr() for p in Muon(model, 0.01)._flat}


def test_every_method_has_a_colour_of_its_own():
    assert set(NAMES) <= COLOURS.keys()
    shades = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS.values()]
    assert all(math.dist(a, b) > 40 for a, b in combinations(shades, 2))


def test_batch_sizes_by_method():
    assert default_batch_size("adam", images()) == 40
    small, large = images(n=1500), images(n=3000)
    assert [default_batch_size(m, small) for m in ("adam", "newton", "lbfgs")] == [64, 64, 1500]
    assert [default_batch_size(m, large) for m in ("adam", "newton", "lbfgs")] == [128, 75, 3000]
    assert [default_batch_size("newton", values(n)) for n in (600, 3000, 9000)] == [64, 300, 600]
