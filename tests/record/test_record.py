"""What a tape holds, and that recording leaves no trace but those of one ordinary run of the closure."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import assert_close, dense_reference, flat
from torch import nn
from zoo import ZOO, integers, uniform

import torchnewton as tn


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).double()


X, Y = uniform(6, 3).double(), integers(3, 6)


def test_pieces_have_names_outputs_and_weights():
    p = ZOO["two-losses"](torch.float64)
    first, second = tn.record(p.closure, p.params).pieces
    assert (first.name, second.name) == ("cross_entropy", "mse_loss")
    assert_close(first.weight, torch.tensor(0.7, dtype=torch.float64))
    assert_close(second.weight, torch.tensor(0.3, dtype=torch.float64))
    assert [z.shape for z in first.outputs] == [(5, 3)]
    assert [z.shape for z in second.outputs] == [(5, 2)]


def test_weight_has_the_shape_of_an_unreduced_loss():
    p = ZOO["mse-none"](torch.float64)
    (piece,) = tn.record(p.closure, p.params).pieces
    w = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    assert_close(piece.weight, (w / w.sum()).view(4, 3))


def test_outputs_are_the_inputs_of_the_losses(net):
    net.eval()
    tape = tn.record(lambda: F.nll_loss(F.log_softmax(net(X), 1), Y), net.parameters())
    (z,) = tape.outputs
    assert_close(z, net(X))


CONVEX_BEHIND = {
    "log-of-softmax": lambda z: F.nll_loss(z.softmax(1).log(), Y),
    "guarded-log": lambda z: F.nll_loss(torch.log(1e-12 + F.softmax(z, 1)), Y),
    "larger-guard": lambda z: F.nll_loss(torch.log(F.softmax(z, 1) + 1e-7), Y),
    "mean-of-logs": lambda z: F.nll_loss(z.log_softmax(1).view(3, 2, 3).mean(1), Y[:3]),
    "clamped": lambda z: F.nll_loss(z.softmax(1).clamp(min=0.2).log(), Y),
    "views": lambda z: F.nll_loss(z.log_softmax(1).t().reshape(3, 6).T[1:].to(torch.float32), Y[1:]),
    "clamped-sigmoid": lambda z: F.binary_cross_entropy(torch.sigmoid(z).clamp(0.4, 0.6), F.one_hot(Y, 3).double()),
}
ELSEWHERE = {
    "smoothed": lambda z: F.nll_loss(torch.log(0.5 * F.softmax(5 * z, 1) + 0.125), Y),
    "large-guard": lambda z: F.nll_loss(torch.log(F.softmax(9 * z, 1) + 1e-3), Y),
    "mixture": lambda z: F.nll_loss(torch.log(torch.stack([z, -z]).softmax(2).mean(0)), Y),
    "no-logarithm": lambda z: F.nll_loss(z.softmax(1), Y),
}


@pytest.mark.parametrize("name", CONVEX_BEHIND)
def test_a_split_behind_an_activation(name):
    model = nn.Linear(3, 3).double()
    tape = tn.record(lambda: CONVEX_BEHIND[name](model(X)), model.parameters())
    assert_close(tape.outputs[0], model(X))
    assert torch.linalg.eigvalsh(tn.GaussNewton(tape).to_dense()).min() >= -1e-7


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_split_where_the_loss_is_not_convex_in_the_logits(name):
    model = nn.Linear(3, 3).double()
    tape = tn.record(lambda: ELSEWHERE[name](model(X)), model.parameters())
    with pytest.raises(tn.RecordError, match=r"tn\.outputs"):
        tn.GaussNewton(tape).to_dense()


def test_smoothed_probabilities_are_outputs_themselves():
    model = nn.Linear(3, 3).double()
    target = F.one_hot(Y, 3).double()

    def smoothed():
        return 0.9 * torch.sigmoid(9 * model(X)) + 0.05

    tape = tn.record(lambda: F.binary_cross_entropy(smoothed(), target), model.parameters())
    assert_close(tape.outputs[0], smoothed())
    assert torch.linalg.eigvalsh(tn.GaussNewton(tape).to_dense()).min() >= -1e-7


def test_an_output_of_two_losses_counts_once():
    p = ZOO["two-losses-of-one-output"](torch.float64)
    assert len(tn.record(p.closure, p.params).outputs) == 1


def test_layer_calls_are_those_with_a_live_parameter():
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()
    first.requires_grad_(False)
    tape = tn.record(lambda: F.cross_entropy(second(second(first(X))), Y), [*first.parameters(), *second.parameters()])
    assert [call.function for call in tape.layer_calls] == [F.linear, F.linear]
    for call in tape.layer_calls:
        assert [p is q for p, q in zip(call.parameters, second.parameters(), strict=True)] == [True, True]
        assert_close(call(call.tensors), second(call.input))
    assert_close(tape.layer_calls[0].input, first(X))
    assert tape.layer_calls[1].input.grad_fn is tape.layer_calls[0].edge[0]


def test_parameters_may_be_a_generator(net):
    tape = tn.record(lambda: F.cross_entropy(net(X), Y), net.parameters())
    assert len(tape.gradient) == len(list(net.parameters()))


def test_buffers_move_as_in_one_forward_pass(net):
    twin = copy.deepcopy(net)
    torch.manual_seed(0)
    twin(X)
    torch.manual_seed(0)
    tape = tn.record(lambda: F.cross_entropy(net(X), Y), net.parameters())
    A = tn.GaussNewton(tape)
    A.to_dense()
    A @ torch.ones(A.shape[1], dtype=torch.float64)
    for moved, expected in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(moved, expected)


def test_random_streams_advance_as_in_one_run(net):
    def closure():
        noise = random.random() + np.random.rand()
        return F.cross_entropy(net(X) + noise * torch.randn(3), Y)

    def draw(run):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        run()
        return torch.rand(()).item(), random.random(), np.random.rand()

    def record():
        tn.GaussNewton(tn.record(closure, net.parameters())).to_dense()

    assert draw(record) == draw(closure)


@pytest.mark.parametrize("zero", [True, False])
def test_grad_is_filled_as_backward_fills_it(net, zero):
    net.eval()
    params = list(net.parameters())
    tape = tn.record(lambda: F.cross_entropy(net(X), Y), params)
    assert all(p.grad is None for p in params)

    def closure():
        if zero:
            net.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        return loss

    for times in (1, 1 if zero else 2):
        again = tn.record(closure, params)
        assert_close(flat([p.grad for p in params]), times * flat(tape.gradient))
        assert_close(flat(again.gradient), flat(tape.gradient))
        assert not any(p.grad.requires_grad for p in params)


def test_grad_is_there_right_after_backward_in_the_closure(net):
    """Lightning and skorch call hooks there; clipping changes p.grad, not the recorded gradient."""
    net.eval()
    params = list(net.parameters())
    expected = tn.record(lambda: F.cross_entropy(net(X), Y), params).gradient

    def closure():
        net.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        seen.append(nn.utils.clip_grad_norm_(params, 1e-3))
        return loss

    seen: list[torch.Tensor] = []
    tape = tn.record(closure, params)
    assert_close(seen[0], flat(expected).norm())
    assert_close(flat(tape.gradient), flat(expected))


def test_several_backward_calls_are_summed_whatever_is_returned():
    p = ZOO["accumulated"](torch.float64)
    e = dense_reference(p.params, p.outputs, p.loss)

    def closure():
        p.closure()
        return 7.0

    tape = tn.record(closure, p.params)
    assert_close(tape.loss, e.loss)
    assert_close(flat(tape.gradient), e.gradient)
    assert_close(flat([q.grad for q in p.params]), e.gradient)


def test_backward_with_a_gradient_argument_weighs_the_loss(net):
    net.eval()
    params = list(net.parameters())
    w = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)

    def closure():
        losses = F.cross_entropy(net(X), Y, reduction="none")
        losses.backward(gradient=w)
        return losses.detach().sum()

    tape = tn.record(closure, params)
    e = dense_reference(params, lambda: [net(X)], lambda z: (w * F.cross_entropy(z, Y, reduction="none")).sum())
    assert_close(tape.loss, e.loss)
    assert_close(flat(tape.gradient), e.gradient)
    assert_close(tn.GaussNewton(tape).to_dense(), e.gauss_newton)


def test_autograd_backward_function_of_two_losses(net):
    net.eval()
    params = list(net.parameters())

    def losses():
        z = net(X)
        return [F.cross_entropy(z, Y), F.mse_loss(z, torch.zeros_like(z))]

    def closure():
        torch.autograd.backward(losses())
        return torch.zeros(())

    tape = tn.record(closure, params)
    e = dense_reference(params, lambda: [net(X)], lambda z: F.cross_entropy(z, Y) + F.mse_loss(z, torch.zeros_like(z)))
    assert_close(flat(tape.gradient), e.gradient)
    assert_close(tn.GaussNewton(tape).to_dense(), e.gauss_newton)


def l2(net: nn.Module) -> torch.Tensor:
    return F.cross_entropy(net(X), Y) + 0.05 * sum(p.square().sum() for p in net.parameters())


def logit_penalty(net: nn.Module) -> torch.Tensor:
    z = net(X)
    return F.cross_entropy(z, Y) + 0.1 * torch.logsumexp(z, 1).square().mean()


def smoothing_by_hand(net: nn.Module) -> torch.Tensor:
    log_p = F.log_softmax(net(X), 1)
    return F.nll_loss(log_p, Y) - 0.1 * log_p.mean()


def entropy_bonus(net: nn.Module) -> torch.Tensor:
    z = net(X)
    return F.cross_entropy(z, Y) + 0.1 * (z.softmax(1) * z.log_softmax(1)).sum(1).mean()


def penalty_on_activations(net: nn.Module) -> torch.Tensor:
    h = net[:4](X)
    return F.cross_entropy(net[4](h), Y) + 0.1 * h.abs().mean()


def learned_targets(net: nn.Module) -> torch.Tensor:
    return F.cross_entropy(net(X), net(X + 1).softmax(1))


def learned_variance(net: nn.Module) -> torch.Tensor:
    z = net(X)
    return F.gaussian_nll_loss(z[:, :1], X[:, :1], F.softplus(z[:, 1:2]))


@pytest.mark.parametrize(
    "loss",
    [
        l2,
        logit_penalty,
        smoothing_by_hand,
        entropy_bonus,
        penalty_on_activations,
        learned_targets,
        learned_variance,
    ],
)
def test_gradient_is_exact_where_part_of_the_loss_has_no_split(net, loss):
    """That part has no curvature in G, but G is a Gauss-Newton matrix all the same."""
    net.eval()
    params = list(net.parameters())
    value = loss(net)
    gradient = flat(torch.autograd.grad(value, params))
    tape = tn.record(lambda: loss(net), params)
    assert_close(tape.loss, value)
    assert_close(flat(tape.gradient), gradient)
    dense = tn.GaussNewton(tape).to_dense()
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12 * dense.norm()
    v = torch.ones(len(gradient), dtype=torch.float64)
    assert_close(tn.GaussNewton(tape) @ v, dense @ v)


def test_hand_written_l2_penalty_has_no_curvature(net):
    net.eval()
    params = list(net.parameters())
    e = dense_reference(params, lambda: [net(X)], lambda z: F.cross_entropy(z, Y))
    assert_close(tn.GaussNewton(tn.record(lambda: l2(net), params)).to_dense(), e.gauss_newton)


def test_recording_works_inside_no_grad(net):
    net.eval()
    with torch.no_grad():
        inside = tn.record(lambda: F.cross_entropy(net(X), Y), net.parameters())
    outside = tn.record(lambda: F.cross_entropy(net(X), Y), net.parameters())
    assert_close(flat(inside.gradient), flat(outside.gradient), 0.0)


def test_marking_outputs_outside_of_a_recording_changes_nothing():
    z = torch.randn(3, requires_grad=True)
    assert tn.outputs(z) is z
