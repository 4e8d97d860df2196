"""What loops and closures do besides: freezing, copies, masks, penalties, second optimizers, domains that end."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchnewton as tn

SECANT = partial(tn.WorkerSecant, num_workers=2)


def batch(number: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(number % 6))
    return x, (x[:, 0] * x[:, 1] > 0).long()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    def step(number: int) -> float:
        x, y = batch(number)
        return float(optimizer.step(lambda: F.cross_entropy(model(x), y)))

    return [step(number) for number in steps]


@pytest.mark.parametrize("change", ["freeze", "unfreeze", "add_param_group"])
@pytest.mark.parametrize("at", [5, 16, 23, 45])  # full steps, gliding ones, between trials, after one
def test_other_parameters_are_trained_from_some_step_on(change: str, at: int) -> None:
    """The layers have equal shapes, so that factors of the wrong one would not be noticed by shape."""
    model = perceptron()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    model[0].requires_grad_(change == "freeze")
    optimizer = tn.Newton(last if change == "add_param_group" else model.parameters())
    train(model, optimizer, range(at))
    model[0].requires_grad_(change != "freeze")
    if change == "add_param_group":
        optimizer.add_param_group({"params": first})
    twin = copy.deepcopy(model)
    reference = tn.Newton(
        [*twin[2].parameters(), *twin[0].parameters()] if change == "add_param_group" else twin.parameters()
    )
    assert train(model, optimizer, range(at, at + 30)) == train(twin, reference, range(at, at + 30))


@pytest.mark.parametrize("change", ["freeze", "add_param_group"])
def test_an_error_at_the_first_step_of_other_parameters_forgets_nothing(change: str) -> None:
    model = perceptron()
    optimizer = tn.Newton(model[2].parameters() if change == "add_param_group" else model.parameters())
    train(model, optimizer, range(20))
    before, known = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    if change == "add_param_group":
        optimizer.add_param_group({"params": list(model[0].parameters())})
    else:
        model[0].requires_grad_(False)
    with pytest.raises(KeyError, match="no such file"):
        optimizer.step(lambda: {}["no such file"])
    if change == "add_param_group":
        del optimizer.param_groups[-1]
    else:
        model[0].requires_grad_(True)
    twin = perceptron()
    twin.load_state_dict(before)
    reference = tn.Newton(twin[2].parameters() if change == "add_param_group" else twin.parameters())
    reference.load_state_dict(known)
    assert train(model, optimizer, range(20, 40)) == train(twin, reference, range(20, 40))


class Failing(tn.LevenbergMarquardt):
    """A rule that fails after the move."""

    def update(self, *_: Any) -> float:
        raise KeyError("of the rule")


def test_an_error_after_the_move_takes_it_back() -> None:
    model = perceptron()
    optimizer = tn.Newton(model.parameters(), damping=Failing())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError, match="of the rule"):
        train(model, optimizer, range(1))
    assert optimizer.report.step_length > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("solver", [tn.Direct(), tn.Dual(), tn.Auto(), tn.CG(max_iterations=3)])
def test_explicit_factors_as_the_curvature(solver: tn.Solver) -> None:
    """What a product with them costs is found by a backward pass, which has to come before the parameters move."""
    model = perceptron()
    optimizer = tn.Newton(
        model.parameters(), curvature=lambda tape: tn.GaussNewton(tape, tn.LayerJacobian(tape)), solver=solver
    )
    losses = train(model, optimizer, range(0, 18, 6))
    assert losses == sorted(losses, reverse=True)
    work = 1 + optimizer.report.loss_evaluations / 3 + 2 / 3 * optimizer.report.products
    assert optimizer.report.gradient_equivalents >= work - 1e-12


@pytest.mark.parametrize("factor", [math.nan, 0.0])
def test_a_step_that_ends_at_its_gradient_counts_it(factor: float) -> None:
    model = perceptron()
    optimizer = tn.NewtonCG(model.parameters())
    train(model, optimizer, range(1))
    optimizer.step(lambda: F.cross_entropy(model(batch(0)[0]), batch(0)[1]) * factor)
    assert not optimizer.report.accepted
    assert optimizer.report.gradient_equivalents == 1


@pytest.mark.parametrize("at", [3, 17, 44])
@pytest.mark.parametrize(
    "make",
    [tn.Newton, tn.SGN, tn.NewtonCG, tn.HessianFree, tn.NewtonKrylov, partial(tn.NewtonKrylov, disagreement=1.0)],
)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_bit_for_bit(
    make: Callable[[Any], torch.optim.Optimizer], duplicate: Callable[[Any], Any], at: int
) -> None:
    model = perceptron()
    optimizer = make(model.parameters())
    train(model, optimizer, range(at))
    other, other_optimizer = duplicate((model, optimizer))
    random = torch.get_rng_state()
    expected = train(model, optimizer, range(at, at + 8))
    torch.set_rng_state(random)
    assert train(other, other_optimizer, range(at, at + 8)) == expected


def test_a_penalty_on_what_requires_gradients_counts_in_trials_too() -> None:
    model, (x, y), seen = perceptron(), batch(0), []
    optimizer = tn.Newton(model.parameters())

    def closure() -> Tensor:
        penalty = 1e-5 * torch.stack([p.pow(2).sum() for p in model.parameters() if p.requires_grad]).sum()
        seen.append(float(penalty.detach()))
        return F.cross_entropy(model(x), y) + penalty

    with pytest.warns(UserWarning, match="beside the recorded outputs"):
        optimizer.step(closure)
    optimizer.step(closure)
    assert len(seen) > 4
    assert min(seen) > 0


def test_gradients_can_be_read_after_backward_in_every_run() -> None:
    model, (x, y), norms = perceptron(), batch(0), []
    optimizer = tn.Newton(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
        return loss

    optimizer.step(closure)
    assert len(norms) > 2
    assert norms == [norms[0]] * len(norms)
    assert norms[0] > 0


@pytest.mark.parametrize("hidden", [-math.inf, -1e9])
def test_masked_logits(hidden: float) -> None:
    model, mask = perceptron(), torch.tensor([False, False, False, True])
    optimizer = tn.Newton(model.parameters())
    losses = []
    for number in range(20):
        x, y = batch(number)
        losses.append(float(optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x).masked_fill(mask, hidden), y))))
        assert optimizer.report.accepted
    assert losses[-1] < 0.6 * losses[0]


def test_attention_with_a_padding_mask() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x, padding = torch.randn(6, 5, 8), torch.zeros(6, 5, dtype=torch.bool)
    padding[0, 3:] = True
    optimizer = tn.Newton(attention.parameters())

    def loss() -> Tensor:
        return F.mse_loss(attention(x, x, x, key_padding_mask=padding)[0], torch.zeros_like(x))

    first = float(optimizer.step(loss))
    for _ in range(9):
        optimizer.step(loss)
    assert float(loss().detach()) < 0.2 * first


@pytest.mark.parametrize("seed", range(6))
def test_steps_out_of_the_domain_are_not_taken(seed: int) -> None:
    """The marginal likelihood of a Gaussian process, whose covariance loses its Cholesky factor on the way."""
    torch.manual_seed(seed)
    params = [nn.Parameter(2 * torch.randn(())) for _ in range(3)]
    x = 4 * torch.rand(40)
    y = torch.sin(2 * x) * 5

    def closure() -> Tensor:
        length, scale, noise = tn.outputs(torch.stack(params)).unbind()
        K = scale.exp() * torch.exp(-0.5 * ((x[:, None] - x) / length.exp()) ** 2) + noise.exp() * torch.eye(40)
        factor = torch.linalg.cholesky(K)
        return 0.5 * y @ torch.cholesky_solve(y[:, None], factor)[:, 0] + factor.diag().log().sum()

    optimizer = tn.Newton(params)
    first = float(closure().detach())
    for _ in range(60):
        optimizer.step(closure)
    assert float(closure().detach()) <= first


def test_what_has_no_second_derivative_stays_in_the_plane() -> None:
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(20, 6), nn.Linear(6, 3)  # torch has no second derivative of a mean of embeddings
    optimizer = tn.Newton([*bag.parameters(), *head.parameters()])
    words = torch.randint(20, (16, 5))
    losses, statuses = [], []
    for _ in range(40):
        losses.append(float(optimizer.step(lambda: F.cross_entropy(head(bag(words)), words[:, 0] % 3))))
        statuses.append(optimizer.report.status)
    assert sum("no exact step can be made" in status for status in statuses) == 1
    assert optimizer.report.regime == "plane"
    assert losses[-1] < 0.01 * losses[0]


def test_buffers_that_a_forward_pass_moves_and_uses() -> None:
    torch.manual_seed(0)
    norm = nn.utils.spectral_norm
    model = nn.Sequential(norm(nn.Linear(4, 64)), nn.ReLU(), norm(nn.Linear(64, 4)))
    losses = train(model, tn.Newton(model.parameters()), range(20))
    assert losses[-1] < losses[0]


def test_the_first_group_may_be_empty() -> None:
    for make in (tn.Newton, tn.SGN, tn.NewtonCG):
        model = perceptron()
        losses = train(model, make([{"params": []}, {"params": model.parameters()}]), range(5))
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [tn.Newton, tn.NewtonKrylov, tn.EntropySGD, tn.DCASGD, SECANT])
def test_complex_parameters_are_refused(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
    with pytest.raises(tn.RecordError, match="view_as_complex"):
        make([p]).step(lambda: (p.abs() ** 2).sum())
    assert torch.equal(p.detach(), torch.ones(2, dtype=torch.cfloat))


@pytest.mark.parametrize("returned", [None, (torch.ones(()), 1), torch.ones(2)])
@pytest.mark.parametrize("make", [tn.EntropySGD, tn.DCASGD, SECANT])
def test_a_closure_that_returns_no_loss(make: Callable[[Any], torch.optim.Optimizer], returned: Any) -> None:
    model = perceptron()
    optimizer, before = make(model.parameters()), copy.deepcopy(model.state_dict())

    def closure() -> Any:
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
        return returned

    with pytest.raises(ValueError, match="has to return the loss"):
        optimizer.step(closure)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (tn.Newton, "weight_decay", -1.0),
        (tn.Newton, "weight_decay", math.inf),
        (tn.SGN, "weight_decay", math.nan),
        (tn.EntropySGD, "lr", -1.0),
        (tn.EntropySGD, "average", 1.5),
        (tn.DCASGD, "compensation", -1.0),
        (SECANT, "rest_lr", -1.0),
    ],
)
def test_options_out_of_range_are_refused_in_groups_too(make: Any, option: str, value: float) -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{option}={value}"):
        make([p], **{option: value})
    with pytest.raises(ValueError, match=f"{option}={value}"):
        make([{"params": [p], option: value}])
    optimizer = make([p])
    with pytest.raises(ValueError, match=f"{option}={value}"):
        optimizer.add_param_group({"params": [q], option: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("change", ["freeze", "unfreeze", "add_param_group"])
@pytest.mark.parametrize(
    "make",
    [
        partial(tn.DCASGD, delay=2, adaptive=True, momentum=0.5),
        partial(tn.WorkerSecant, num_workers=3, past_rounds=2),
        partial(tn.EntropySGD, inner_steps=2),
    ],
)
def test_first_order_methods_train_other_parameters_from_some_step_on(
    make: Callable[[Any], torch.optim.Optimizer], change: str
) -> None:
    model = perceptron()
    model[0].requires_grad_(change == "freeze")
    optimizer = make(model[2].parameters() if change == "add_param_group" else model.parameters())

    def step() -> float:
        def closure() -> Tensor:
            model.zero_grad()
            loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
            loss.backward()
            return loss

        return float(optimizer.step(closure))

    losses = [step() for _ in range(3)]
    model[0].requires_grad_(change != "freeze")
    if change == "add_param_group":
        optimizer.add_param_group({"params": list(model[0].parameters())})
    losses += [step() for _ in range(6)]
    assert losses[-1] < losses[0]
    assert optimizer.report.accepted  # type: ignore[attr-defined]


def test_another_optimizer_gets_its_gradients() -> None:
    """As from `backward`, in full steps, gliding ones and those on trial."""
    model = perceptron()
    optimizer, other = tn.Newton(model[0].parameters()), torch.optim.SGD(model[2].parameters(), lr=0.1)
    for number in range(50):
        x, y = batch(number)
        expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model[2].parameters()))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            other.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        for p, g in zip(model[2].parameters(), expected, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, g)
        other.step()


def test_points_of_a_loss_with_derivatives_are_not_differentiated_by() -> None:
    """Which would cost as much again as the gradient."""
    model, x = perceptron(), batch(0)[0].requires_grad_()
    optimizer = tn.Newton(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        loss = F.mse_loss(slope, torch.ones_like(slope))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.report.accepted
    assert x.grad is None


def test_the_first_step_is_tried_again_with_a_larger_damping() -> None:
    """Where it is rejected since there is no product with the curvature: the closure is defined at one point alone."""
    p = nn.Parameter(torch.ones(3))
    x, y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(10)

    def closure() -> Tensor:
        if not torch.equal(p.detach(), torch.ones(3)):
            raise ValueError("not defined here")
        return F.mse_loss(x @ p, y)

    optimizer = tn.Newton([p])
    dampings = []
    for _ in range(4):
        optimizer.step(closure)
        assert not optimizer.report.accepted
        dampings.append(optimizer.report.damping)
    assert dampings == sorted(set(dampings))
    assert torch.equal(p.detach(), torch.ones(3))


@pytest.mark.parametrize("whole_loss", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        partial(tn.EntropySGD, inner_steps=2),
        partial(tn.DCASGD, delay=1),
        partial(tn.WorkerSecant, num_workers=2),
    ],
)
def test_what_is_compiled_trains_as_what_is_not(make: Callable[[Any], torch.optim.Optimizer], whole_loss: bool) -> None:
    """From the first call on, and with its buffers."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        called = torch.compile(model, backend="eager") if compiled and not whole_loss else model

        def loss_of(x: Tensor, y: Tensor, called: Callable[[Tensor], Tensor] = called) -> Tensor:
            return F.cross_entropy(called(x), y)

        loss = torch.compile(loss_of, backend="eager") if compiled and whole_loss else loss_of
        optimizer = make(model.parameters())

        def closure(model: nn.Module = model, loss: Callable[[Tensor, Tensor], Tensor] = loss) -> Tensor:
            model.zero_grad()
            value = loss(*batch(0))
            value.backward()
            return value

        losses = [float(optimizer.step(closure)) for _ in range(2)]
        ends.append((losses, [value.tolist() for value in model.state_dict().values()]))
    assert ends[0] == ends[1]
