"""`over`: steps on an objective of many batches are those on one batch of all data, with the memory of one."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import differences, make_model, snapshot
from reference import assert_close, flat
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset
from zoo import integers, uniform

import torchnewton as tn

X, Y = uniform(23, 4).double(), integers(3, 23)
PART = torch.arange(3, 20, 2)  # nine samples

METHODS = {
    "newton": partial(tn.Newton, solver=tn.CG(rtol=0.1, max_iterations=20)),
    "newton-direct": partial(tn.Newton, solver=tn.Direct(), acceleration=None),
    "newton-momentum": partial(tn.Newton, solver=tn.CG(rtol=0.1, max_iterations=20), momentum=0.3),
    "plane": partial(tn.Newton, solver=tn.Plane(), damping=tn.LevenbergMarquardt(initial=0.1)),
    "hessian": partial(tn.Newton, curvature=tn.Hessian, solver=tn.MINRES(max_iterations=10)),
    "sgn": tn.SGN,
    "newton-cg": tn.NewtonCG,
    "newton-krylov": tn.NewtonKrylov,
}


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def cross_entropy(model: nn.Module, i: Tensor) -> Tensor:
    return F.cross_entropy(model(X[i]), Y[i])


def squares(model: nn.Module, i: Tensor) -> Tensor:
    return F.mse_loss(model(X[i]), F.one_hot(Y[i], 3).double(), reduction="sum") / len(i)


def objective(model: nn.Module, indices: Tensor, size: int, loss=cross_entropy, **options):
    return tn.over(indices.split(size), partial(loss, model), **options)


@pytest.mark.parametrize("with_part", [False, True])
@pytest.mark.parametrize("loss", [cross_entropy, squares])
@pytest.mark.parametrize("method", METHODS)
def test_streamed_steps_are_those_on_all_data_at_once(method, loss, with_part):
    """23 samples by 5, the last batch with 3; the curvature of 9 by 4, the last with 1."""
    whole, streamed = _model(), _model()
    everything = torch.arange(23)
    reference = METHODS[method](whole.parameters(), weight_decay=0.01)
    optimizer = METHODS[method](streamed.parameters(), weight_decay=0.01)
    for _ in range(5):
        part = (partial(loss, whole, PART),) if with_part else ()
        expected = reference.step(partial(loss, whole, everything), *part)
        part = (objective(streamed, PART, 4, loss),) if with_part else ()
        found = optimizer.step(objective(streamed, everything, 5, loss), *part)
        assert_close(found, expected, 1e-8)
        assert optimizer.report.accepted == reference.report.accepted
        assert ("streamed" in optimizer.report.jacobian) == (method != "newton-direct")
    # with little damping, many iterations of CG amplify rounding
    assert_close(flat(streamed.parameters()), flat(whole.parameters()), 1e-10 if method == "newton-cg" else 1e-8)


def test_newton_itself_takes_a_stream():
    """Where a factorization is cheapest, only the second-order correction is left out."""
    model = _model()
    optimizer = tn.Newton(model.parameters())
    losses = [float(optimizer.step(objective(model, torch.arange(23), 5))) for _ in range(15)]
    assert losses[-1] < 0.1 * losses[0]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 99))
def test_any_cut_gives_the_same_operator(sizes, seed):
    """Loss, gradient and product; ⟨Au, v⟩ = ⟨u, Av⟩, A(u + 2v) = Au + 2Av, ⟨u, Au⟩ ≥ 0."""
    model = _model()
    params = list(model.parameters())
    indices = torch.arange(sum(sizes)) % 23
    data = tn.over(indices.split(sizes), partial(cross_entropy, model))
    A = tn.Average(data, params)
    tape = tn.record(partial(cross_entropy, model, indices), params)
    G = tn.GaussNewton(tape)
    u, v = torch.randn(2, A.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_close(A.loss, tape.loss)
    assert_close(flat(A.gradient), flat(tape.gradient))
    Au, Av = A @ u, A @ v
    assert_close(Au, G @ u)
    assert abs(u @ Av - v @ Au) <= 1e-12 * Au.norm() * v.norm()
    assert_close(A @ (u + 2 * v), Au + 2 * Av, 1e-12)
    assert u @ Au >= 0
    assert_close(data(), tape.loss)


def test_weights_of_any_kind():
    model, params = _model(), None
    params = list(model.parameters())
    batches = [{"index": range(6)}, {"index": range(6, 8)}]
    loss = lambda b: cross_entropy(model, torch.tensor(list(b["index"])))  # noqa: E731
    expected = tn.record(partial(cross_entropy, model, torch.arange(8)), params)
    for weights in (lambda b: len(b["index"]), [3.0, 1.0]):
        A = tn.Average(tn.over(batches, loss, weights=weights), params)
        assert_close(flat(A.gradient), flat(expected.gradient))
    closures = [partial(loss, b) for b in batches]
    assert_close(tn.Average(tn.over(closures, weights=[3.0, 1.0]), params).loss, expected.loss)
    assert_close(tn.over(closures)(), (closures[0]() + closures[1]()) / 2)


def dropout_model() -> nn.Module:
    return make_model().double()


def test_masks_repeat_and_statistics_move_once():
    """A step leaves random numbers and statistics where one pass over the data leaves them."""
    model, twin = dropout_model(), dropout_model()
    optimizer = tn.NewtonCG(model.parameters())
    loader = DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)

    def data(model):
        return tn.over(loader, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))

    part = objective(model, PART, 3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(0)
    twin_loss = float(data(twin)().detach())
    twin_buffers = [b.clone() for b in twin.buffers()]
    objective(twin, PART, 3)()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert float(optimizer.step(data(model), curvature=part)) == pytest.approx(twin_loss, rel=1e-14)
    assert optimizer.report.loss_evaluations >= 1
    assert optimizer.report.products > 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin_buffers, strict=True))
    assert int(model[1].num_batches_tracked) == 4
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@pytest.mark.parametrize("method", ["newton-cg", "newton-krylov", "newton-direct"])
def test_buffers_that_a_forward_pass_reads_run_through_every_pass(method):
    """The loss after a step that is measured within it is that of the same pass at the new parameters."""
    torch.manual_seed(1)
    model = nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = METHODS[method](model.parameters())
    data = objective(model, torch.arange(23), 5)
    twin = copy.deepcopy(model)
    for _ in range(3):
        twin.load_state_dict(model.state_dict())
        before = float(objective(twin, torch.arange(23), 5)().detach())
        after = {name: b.clone() for name, b in twin.named_buffers()}
        twin.load_state_dict(model.state_dict())
        assert float(optimizer.step(data)) == pytest.approx(before, rel=1e-14)
        assert optimizer.report.accepted
        assert all(torch.equal(b, after[name]) for name, b in model.named_buffers())
        with torch.no_grad():
            for p, new in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(new)
        reached = before - optimizer.report.actual_reduction
        assert float(objective(twin, torch.arange(23), 5)().detach()) == pytest.approx(reached, rel=1e-13)


def test_the_curvature_of_a_stream_is_that_at_the_buffers_of_its_gradient():
    """Against one graph of all batches, through which the buffers run as well."""
    torch.manual_seed(1)
    model = nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    params, start = list(model.parameters()), copy.deepcopy(model.state_dict())
    data = objective(model, torch.arange(23), 5)
    v = torch.randn(sum(p.numel() for p in params), dtype=torch.float64)
    expected = tn.Hessian(tn.record(data, params)) @ v
    for curvature in (tn.Hessian, tn.ComplexStepHessian.of):
        model.load_state_dict(start)
        A = tn.Average(data, params, curvature=curvature)
        for _ in range(2):
            assert_close(A @ v, expected, 1e-12)
        assert differences(snapshot(model), start) == []


@pytest.mark.parametrize("where", ["loss", "curvature"])
@pytest.mark.parametrize("method", ["newton", "newton-cg", "sgn"])
def test_a_batch_that_is_not_finite_rejects_the_step(method, where):
    model = dropout_model()
    optimizer = METHODS[method](model.parameters())
    optimizer.step(objective(model, torch.arange(23), 6), curvature=objective(model, PART, 3))
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())

    def broken(model, i):
        return cross_entropy(model, i) * (float("nan") if len(i) < 4 else 1.0)

    data = objective(model, torch.arange(23), 5, broken if where == "loss" else cross_entropy)
    part = objective(model, PART, 3, broken if where == "curvature" else cross_entropy)
    damping = optimizer.state_dict()["state"][0]["damping"]
    optimizer.step(data, curvature=part)
    assert optimizer.report.status.startswith("rejected")
    assert differences(snapshot(model), before) == []
    assert optimizer.state_dict()["state"][0]["damping"] > damping
    assert state["state"].keys() == optimizer.state_dict()["state"].keys()


def test_an_error_in_a_batch_leaves_everything():
    model = dropout_model()
    optimizer = tn.NewtonCG(model.parameters())
    data = objective(model, torch.arange(23), 6)
    optimizer.step(data)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())

    def broken(i):
        if len(i) < 4:
            raise KeyError("a file is missing")
        return cross_entropy(model, i)

    for arguments in ((tn.over(torch.arange(23).split(5), broken),), (data, tn.over(PART.split(4), broken))):
        with pytest.raises(KeyError, match="missing"):
            optimizer.step(*arguments)
        assert differences(snapshot(model), before) == []
        assert optimizer.state_dict()["state"][0]["damping"] == state["state"][0]["damping"]


def test_progress_of_every_pass():
    model = _model()
    seen = []
    data = objective(model, torch.arange(23), 5, progress=lambda *call: seen.append(("all", *call)))
    part = objective(model, PART, 4, progress=lambda *call: seen.append(("part", *call)))
    optimizer = tn.NewtonCG(model.parameters())
    optimizer.step(data, curvature=part)
    assert seen[:5] == [("all", "gradient", k, 5) for k in range(1, 6)]
    assert seen[5:10] == [("all", "loss", k, 5) for k in range(1, 6)]  # the first step checks that it repeats
    report = optimizer.report
    assert seen.count(("part", "curvature", 3, 3)) == report.products
    assert seen.count(("all", "loss", 5, 5)) == 1 + report.loss_evaluations
    assert report.gradient_equivalents == pytest.approx(
        1 + report.loss_evaluations / 3 + report.products * (9 / 23) * 7 / 3
    )
    seen.clear()
    batches = DataLoader(_Endless(), batch_size=3)
    optimizer.step(tn.over(batches, lambda x: F.mse_loss(model(x), x[:, :3]), progress=lambda *call: seen.append(call)))
    assert seen[0] == ("gradient", 1, None)


class _Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(X[:8])


def test_a_single_batch_keeps_its_graph():
    model = _model()
    optimizer = tn.NewtonCG(model.parameters())
    optimizer.step(objective(model, torch.arange(23), 5), curvature=objective(model, PART, 9))
    assert "streamed" not in optimizer.report.jacobian
    assert optimizer.report.products > 1


class Token:
    """Lives as long as the node of the graph that holds it."""


def test_no_graph_outlives_its_batch():
    model = _model()
    alive: list[weakref.ref] = []
    most = 0

    def loss(i: Tensor) -> Tensor:
        nonlocal most
        z = model(X[i])
        most = max(most, sum(r() is not None for r in alive))
        if z.grad_fn is not None:
            z.grad_fn.metadata["token"] = token = Token()
            alive.append(weakref.ref(token))
        return F.cross_entropy(z, Y[i])

    optimizers = [METHODS[name](model.parameters()) for name in ("newton-cg", "newton-krylov", "newton-direct")]
    gc.collect()
    gc.disable()
    try:
        for optimizer in optimizers:
            optimizer.step(tn.over(torch.arange(23).split(5), loss), curvature=tn.over(PART.split(4), loss))
            optimizer.step(tn.over(torch.arange(23).split(5), loss))
    finally:
        gc.enable()
    assert len(alive) > 80
    assert most <= 1


def test_misuse():
    model = _model()
    data = objective(model, torch.arange(23), 5)
    with pytest.raises(ValueError, match="iterator"):
        tn.over(iter(torch.arange(4).split(2)), lambda i: i)
    with pytest.raises(ValueError, match="no batch"):
        tn.NewtonCG(model.parameters()).step(tn.over([], lambda i: i))
    with pytest.raises(ValueError, match="disagreement=None"):
        tn.NewtonKrylov(model.parameters(), disagreement=1.0).step(data)
    before = flat(model.parameters())
    with pytest.raises(tn.RecordError, match="preconditioner=None"):
        tn.Newton(model.parameters(), preconditioner=tn.KFAC(), solver=tn.Plane()).step(data)
    generator = torch.Generator().manual_seed(0)  # of its own: other batches in every pass
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, drop_last=True, generator=generator)
    with pytest.raises(tn.RecordError, match="draw the batch before"):
        tn.NewtonCG(model.parameters()).step(tn.over(loader, lambda b: F.cross_entropy(model(b[0]), b[1])))
    assert torch.equal(flat(model.parameters()), before)


def test_subsets_cycle_through_equal_blocks():
    subsets = tn.Subsets(103, fraction=0.2, seed=3)
    passes = [[next(subsets) for _ in range(5)] for _ in range(3)]
    for blocks in passes:
        assert sorted(len(b) for b in blocks) == [20, 20, 21, 21, 21]
        assert torch.equal(torch.cat(blocks).sort().values, torch.arange(103))
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))
    again = tn.Subsets(103, fraction=0.2, seed=3)
    again.load_state_dict({"position": 7})
    assert torch.equal(next(again), passes[1][2])
    assert len(next(tn.Subsets(3, fraction=0.01))) == 1
    for arguments in ((0,), (5, 0.0), (5, 1.5)):
        with pytest.raises(ValueError, match="must be"):
            tn.Subsets(*arguments)


def test_resume_is_exact():
    def run(model, optimizer, subsets, steps):
        for _ in range(steps):
            optimizer.step(objective(model, torch.arange(23), 5), curvature=objective(model, next(subsets), 3))

    model, subsets = dropout_model(), tn.Subsets(23, 0.25)
    optimizer = tn.NewtonCG(model.parameters())
    torch.manual_seed(0)
    run(model, optimizer, subsets, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), subsets.state_dict(), torch.get_rng_state()))
    run(model, optimizer, subsets, 4)
    resumed, others = dropout_model(), tn.Subsets(23, 0.25)
    optimizer = tn.NewtonCG(resumed.parameters())
    for target, state in zip((resumed, optimizer, others), saved, strict=False):
        target.load_state_dict(state)
    torch.set_rng_state(saved[3])
    run(resumed, optimizer, others, 4)
    assert differences(snapshot(resumed), snapshot(model)) == []
