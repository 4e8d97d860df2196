"""Gliding steps of Newton without arguments: what they cost, and how they are taken back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchnewton as tn
from torchnewton.optim.glide import Glide, GlideState
from torchnewton.optim.regime import RegimeChoice


class Run:
    """A network in the plane, with a new batch each step."""

    def __init__(self, backward=False, normalized=False):
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(12) if normalized else nn.Identity()
        self.model = nn.Sequential(nn.Linear(6, 12), middle, nn.Tanh(), nn.Linear(12, 5))
        self.optimizer = tn.Newton(self.model.parameters())
        self.optimizer.choice = RegimeChoice(gradients=0.0, flops=0.0)
        self.backward, self.number, self.calls = backward, 0, 0

    def batch(self):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(self.number))
        return x, x[:, :5].argmax(1)

    def step(self, scale=1.0, returned=lambda loss: loss):
        x, y = self.batch()
        self.number, self.calls = self.number + 1, 0

        def closure():
            self.calls += 1
            loss = F.cross_entropy(self.model(scale * x), y)
            if self.backward:
                self.optimizer.zero_grad()
                loss.backward()
            return returned(loss)

        self.optimizer.step(closure)
        return self.optimizer.report

    def until_gliding(self):
        """To a point whose next step glides on a backward pass."""
        for _ in range(200):
            self.step()
            if (
                self.state["glide"]["left"] > 0
                and self.state["glide"]["gone"] > 0
                and not self.optimizer._running.is_due
            ):
                return
        raise AssertionError("no step has glided")

    @property
    def state(self):
        return self.optimizer.state_dict()["state"][0]

    def parameters(self):
        return [p.detach().clone() for p in self.model.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("backward", [False, True])
def test_a_gliding_step_costs_one_gradient(backward):
    run = Run(backward)
    run.until_gliding()
    before = run.parameters()
    report = run.step()
    assert (report.solver, report.gradient_equivalents, report.loss_evaluations) == ("heavy ball", 1.0, 0)
    assert run.calls == 1
    assert report.accepted
    assert not same(before, run.parameters())


def test_closures_with_and_without_backward_glide_alike():
    runs = [Run(False), Run(True)]
    for run in runs:
        solvers = [run.step().solver for _ in range(60)]
        assert solvers.count("heavy ball") >= 5
    assert all(torch.allclose(p, q, atol=1e-3) for p, q in zip(*(run.parameters() for run in runs), strict=True))


def test_buffers_move_once():
    run = Run(normalized=True)
    run.until_gliding()
    assert run.step().solver == "heavy ball"
    assert int(run.model[1].num_batches_tracked) == run.number


def test_a_returned_number_that_is_not_what_is_differentiated_keeps_the_recorded_step():
    """The loss of the report and the steps are those of what `backward` has been called on."""
    plain, other = Run(backward=True), Run(backward=True)
    for _ in range(40):
        expected, found = plain.step(), other.step(returned=lambda loss: 7 * loss.detach())
        assert found.loss == pytest.approx(expected.loss, rel=1e-2)
        assert found.solver == expected.solver


def test_nan_rejects_a_gliding_step():
    run = Run()
    run.until_gliding()
    before, state = run.parameters(), {k: v.clone() for k, v in run.model.state_dict().items()}
    report = run.step(scale=math.nan)
    assert not report.accepted
    assert same(before, run.parameters())
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())
    assert run.step().accepted


def test_a_gradient_that_is_not_finite_rejects_a_gliding_step():
    """The loss is finite: that the backward pass is not shows when the step is to be made."""
    run = Run(normalized=True)
    run.until_gliding()
    before, state = run.parameters(), {k: v.clone() for k, v in run.model.state_dict().items()}
    weight = run.model[0].weight
    x, y = run.batch()

    def closure():
        return F.cross_entropy(run.model(x), y) + (weight - weight.detach()).square().sum().sqrt()

    run.optimizer.step(closure)
    report = run.optimizer.report
    assert math.isfinite(report.loss)
    assert report.status == "rejected: the gradient is not finite"
    assert same(before, run.parameters())
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())
    assert run.step().accepted


def test_an_exception_in_a_gliding_step_leaves_no_trace():
    """Running statistics that the closure had moved before it raised are put back."""

    class Interrupted(Exception):  # noqa: N818
        pass

    run, twin = Run(normalized=True), Run(normalized=True)
    run.until_gliding(), twin.until_gliding()
    before, state = run.parameters(), {k: v.clone() for k, v in run.model.state_dict().items()}

    def interrupt(loss):
        raise Interrupted

    with pytest.raises(Interrupted):
        run.step(returned=interrupt)
    assert run.calls == 1
    assert same(before, run.parameters())
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())
    run.number -= 1
    assert run.step().solver == twin.step().solver == "heavy ball"
    assert same(run.parameters(), twin.parameters())


def test_a_bad_stretch_is_taken_back_bit_for_bit():
    run = Run()
    run.until_gliding()
    anchor = [run.optimizer.state[p]["anchor"].clone() for p in run.model.parameters()]
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(-30)
    report = run.step()
    assert "taken back" in report.status
    assert not report.accepted
    assert report.gradient_equivalents == pytest.approx(1 + 1 + 1 / 3)  # plain, then recorded; the loss at the anchor
    assert same(anchor, run.parameters())
    assert run.state["glide"]["pause"] == Glide().pause
    assert run.step().solver == "plane of 1 directions"


def test_a_checkpoint_goes_on_gliding():
    run, again = Run(), Run()
    run.until_gliding()
    again.number = run.number
    again.model.load_state_dict(run.model.state_dict())
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    for _ in range(4):
        assert run.step().solver == again.step().solver
        assert run.optimizer.report.damping == again.optimizer.report.damping
    assert same(run.parameters(), again.parameters())


def test_the_factor_shrinks_when_slopes_overshoot():
    glide = Glide()
    state = GlideState(factor=0.8, downhill=1.0, overshot=0.1, period=4)
    assert glide.passed(state).factor == pytest.approx(0.84)
    assert glide.passed(replace(state, overshot=0.3)).factor == pytest.approx(0.56)
    assert glide.passed(replace(state, overshot=0.3, factor=0.3)).factor == glide.least
    assert glide.passed(state).period == 8


def test_full_steps_come_first_then_in_growing_gaps():
    glide, state = Glide(), GlideState(period=20)
    gliding = [glide.after(state, 1.0, (0.5, 0.1), step).left for step in (1, 14, 15, 17, 18, 21, 69, 500)]
    assert gliding == [0, 0, 1, 1, 2, 3, 19, 19]
    assert glide.after(replace(state, pause=2), 1.0, (0.5, 0.1), 500).left == 0


def test_slopes_are_summed_over_a_stretch():
    glide = Glide()
    first = glide.glided(GlideState(left=3, downhill=9.0, overshot=9.0), 1.0, -2.0, 5.0)
    assert (first.downhill, first.overshot, first.left, first.gone) == (0.0, 0.0, 2, 1)
    second = glide.glided(first, 0.9, -1.0, 0.5)
    assert (second.downhill, second.overshot, second.slope) == (2.0, 0.5, -1.0)


def test_when_a_stretch_is_judged():
    glide, state = Glide(), GlideState(losses=(1.0, 0.8), left=2, gone=1)
    assert not glide.is_test_due(state, 1.2)
    assert glide.is_test_due(state, 1.4)
    assert glide.is_test_due(state, math.nan)
    assert glide.is_test_due(replace(state, left=0), 0.5)
    assert not glide.is_test_due(replace(state, gone=0), 9.0)
    assert glide.has_failed(1.3, 1.0)
    assert glide.has_failed(math.nan, 1.0)
    assert not glide.has_failed(1.1, 1.0)
    assert not glide.has_failed(5.0, math.inf)
