"""Blocks by rank against dense linear algebra, what they exchange, and what a slow rank costs."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from data_parallel_cases import closure_of, flat, make_batch, make_model
from newton_cases import STEPS
from ranks import launch
from reference import assert_close, like

import torchnewton as tn
from torchnewton.distributed import Partition

SIZE = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("newton_cases", SIZE, tmp_path_factory)


def by_hand(combine: bool, subset: bool):
    """Dense diagonal blocks, two directions, backtracking, the rule for λ."""
    model = make_model()
    params = list(model.parameters())
    bounds = Partition(tuple(p.shape for p in params), SIZE).bounds
    damping, last = 1.0, None
    for step in range(STEPS):
        closure = closure_of(model, *make_batch(step))
        other = closure_of(model, *make_batch(100 + step)) if subset else closure
        g, f = flat_gradient(closure, params)
        G = tn.GaussNewton(tn.record(other, params)).to_dense()
        A = G + damping * torch.eye(len(g), dtype=g.dtype)
        if subset:  # rank p knows the samples of its own batch only
            parts = [tuple(t.split(128 // SIZE)[p] for t in make_batch(100 + step)) for p in range(SIZE)]
            own = [tn.GaussNewton(tn.record(closure_of(model, *b), params)).to_dense() for b in parts]
            own = [H + damping * torch.eye(len(g), dtype=g.dtype) for H in own]
        else:
            own = [A] * SIZE
        d = torch.zeros_like(g)
        for p, (a, b) in enumerate(pairwise(bounds)):
            d[a:b] = torch.linalg.solve(own[p][a:b, a:b], -g[a:b])
        if combine:
            D = d[:, None] if last is None else torch.stack([d, last], dim=1)
            d = D @ torch.linalg.solve(D.T @ A @ D, -D.T @ g)
        start, alpha = flat(model), 1.0

        def value(d, start=start, closure=closure):
            with torch.no_grad():
                for p, new in zip(params, like(params, start + d), strict=True):
                    p.copy_(new)
            return closure().item()

        while value(alpha * d) - f > 1e-4 * alpha * float(g @ d):
            alpha /= 2
        last = alpha * d
        ratio = (value(last) - f) / float(g @ last + 0.5 * last @ G @ last)
        damping *= 1.5 if ratio < 0.25 else 2 / 3 if ratio > 0.75 else 1.0
    return flat(model)


def flat_gradient(closure, params):
    tape = tn.record(closure, params)
    return torch.cat([g.reshape(-1) for g in tape.gradient]), float(tape.loss)


def test_the_direction_is_that_of_the_diagonal_blocks(ranks):
    for rank in ranks:
        assert torch.equal(rank["on_blocks"][0], ranks[0]["on_blocks"][0])
    assert_close(ranks[0]["on_blocks"][0], by_hand(combine=False, subset=False), 1e-8)


def test_nothing_is_exchanged_during_the_solve(ranks):
    for rank in ranks:
        _, seen, (solver, _, messages) = rank["on_blocks"]
        assert len(seen) == STEPS
        assert all((num_bytes, num) == (0, 0) for num_bytes, num, _ in seen)
        assert all(iterations > 5 for *_, iterations in seen)
        assert "in 4 blocks" in solver
        assert ", 0 bytes exchanged" in solver
        assert messages < 20  # where CG with the whole matrix takes four an iteration


def test_blocks_of_own_samples_and_two_directions(ranks):
    theta, reports = ranks[0]["on_two_directions"]
    for rank in ranks:
        assert torch.equal(rank["on_two_directions"][0], theta)
        assert rank["on_two_directions"][1] == reports
    assert_close(theta, by_hand(combine=True, subset=True), 1e-8)


def test_with_one_block_it_is_newton_cg(ranks):
    assert all(rank["on_one_block"] == (True, True) for rank in ranks)


def test_one_process_needs_no_group():
    theta = []
    for make in (tn.NewtonCG, lambda params: tn.DistributedNewton(params, combine=False)):
        model = make_model()
        optimizer = make(model.parameters())
        for step in range(3):
            optimizer.step(closure_of(model, *make_batch(step)))
        theta.append(flat(model))
    assert torch.equal(*theta)


def test_a_partition_is_complete(ranks):
    shapes = [p.shape for p in make_model().parameters()]
    seen, lengths = [torch.zeros(shape.numel(), dtype=torch.int64) for shape in shapes], []
    for rank in ranks:
        ranges, sizes = rank["on_partition"]
        lengths.append(sum(stop - start for _, start, stop in ranges))
        for position, start, stop in ranges:
            seen[position][start:stop] += 1
    assert all(bool((count == 1).all()) for count in seen)
    assert lengths == sizes
    assert max(sizes) - min(sizes) <= 1


def test_more_ranks_than_entries():
    partition = Partition((torch.Size([2]),), 4)
    assert [partition.ranges(p) for p in range(4)] == [[], [(0, 0, 1)], [], [(0, 1, 2)]]


def iterations_of(solver: str) -> list[int]:
    """Those of every rank."""
    return [int(n) for n in re.search(r"blocks, ([\d/]+) iterations", solver).group(1).split("/")]


def test_a_quorum_does_not_wait_for_a_slow_rank(ranks):
    for rank in ranks:
        (patient, _, num_bytes, _), (hasty, accepted, more_bytes, theta) = rank["on_quorum"]
        assert iterations_of(patient) == [20] * SIZE
        others = iterations_of(hasty)
        assert 3 <= others.pop(1) < 10
        assert sorted(others)[1:] == [20, 20]  # the third may meet the quorum of the first two
        assert accepted
        assert more_bytes > num_bytes
        assert torch.equal(theta, ranks[0]["on_quorum"][1][3])


def test_a_block_that_is_not_finite_rejects_the_step(ranks):
    for rank in ranks:
        untouched, status, accepted_next = rank["on_not_finite_block"]
        assert untouched
        assert status == "rejected: a product with the curvature was not finite"
        assert accepted_next


def test_misuse_is_named():
    with pytest.raises(ValueError, match="share=0"):
        tn.Quorum(share=0.0)
    with pytest.raises(ValueError, match="min_iterations=0"):
        tn.Quorum(min_iterations=0)
