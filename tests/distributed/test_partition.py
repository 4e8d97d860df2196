"""A model cut over a mesh makes the steps of a whole one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from data_parallel_cases import closure_of, make_batch
from partition_cases import (
    MESHES,
    METHODS,
    STEPS,
    VARIANTS,
    loss_of_variant,
    make_model,
    make_residual,
    make_variant,
    products,
    train,
)
from ranks import launch
from reference import assert_close
from torch import nn

import torchnewton as tn
from torchnewton import vectors


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch("partition_cases", 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch("partition_cases", 4, tmp_path_factory)


@pytest.fixture
def ranks(request, two, four):
    return {2: two, 4: four}[request.param]


both = pytest.mark.parametrize("ranks", [2, 4], indirect=True)


@pytest.mark.parametrize("name", METHODS)
@both
def test_ten_steps_are_those_of_one_process(name, ranks):
    expected, steps, _ = train(METHODS[name], make_model())
    for shape in MESHES[len(ranks)]:
        first = ranks[0]["on_methods"][shape, name]
        for rank in ranks:
            theta, found, spent = rank["on_methods"][shape, name]
            assert torch.equal(theta, first[0])
            assert found == first[1]
            assert len(spent) == STEPS
            assert all(num_bytes > 0 and messages > 0 for num_bytes, messages in spent)
        assert_close(first[0], expected)
        assert [iterations for _, iterations in first[1]] == [iterations for _, iterations in steps]
        assert [loss for loss, _ in first[1]] == pytest.approx([loss for loss, _ in steps], rel=1e-10)


@both
def test_rank_ij_holds_the_block_of_outputs_and_inputs(ranks):
    for rank in ranks:
        for (rows, columns), (shapes, (i, j), equal, text) in rank["on_blocks"].items():
            assert equal

            def part(n, size, at):
                return len(torch.arange(n).chunk(size)[at])

            assert shapes == {
                "0.weight": (part(7, columns, j), part(5, rows, i)),
                "0.bias": (part(7, columns, j),),
                "2.weight": (part(6, rows, i), part(7, columns, j)),
                "4.weight": (part(3, columns, j), part(6, rows, i)),
                "4.bias": (part(3, columns, j),),
            }
            assert f"block={shapes['0.weight']}" in text


def owners(model: nn.Module, mesh: tuple[int, int]) -> torch.Tensor:
    """Of every entry of the parameters the rank (i, j) that solves for it, as one number."""

    def parts(n, size):
        return torch.cat([torch.full((len(part),), k) for k, part in enumerate(torch.arange(n).chunk(size))])

    found = []
    for number, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
        across = number % 2
        inputs, outputs = parts(layer.in_features, mesh[across]), parts(layer.out_features, mesh[1 - across])
        at = {across: inputs.expand(len(outputs), -1), 1 - across: outputs[:, None].expand(-1, len(inputs))}
        found.append((at[0] * mesh[1] + at[1]).reshape(-1))
        if layer.bias is not None:  # belongs to the first of those that hold these outputs
            found.append(outputs * mesh[1] if across else outputs)
    return torch.cat(found)


class Blocked:
    """A dense solve with the blocks of the owners alone, and two directions with the whole matrix."""

    uses_previous_step = True

    def __init__(self, owner, combine):
        self.owner, self.combine = owner, combine

    def solve(self, A, b, x0=None, preconditioner=None):
        dense = A.to_dense() * (self.owner[:, None] == self.owner)
        d = vectors.unflatten(torch.linalg.solve(dense, vectors.flatten(b)), b)
        directions = [d] if x0 is None or not self.combine else [d, x0]
        if self.combine:
            d = tn.Plane().over(A, b, directions).solution
        residual = vectors.add(b, A @ d, -1.0)
        return tn.SolveResult(d, residual, 0.0, tn.Status.CONVERGED, 1)


@pytest.mark.parametrize("combine", [False, True])
@both
def test_every_rank_solves_for_its_block(combine, ranks):
    model = make_model()
    optimizer = tn.DistributedNewton(model.parameters(), weight_decay=1e-3)
    optimizer.solver = Blocked(owners(model, MESHES[len(ranks)][0]), combine)
    for step in range(4):
        optimizer.step(closure_of(model, *make_batch(step)))
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for rank in ranks:
        theta, solver = rank["on_own_blocks"][combine]
        assert torch.equal(theta, ranks[0]["on_own_blocks"][combine][0])
        assert_close(theta, expected, 1e-9)
        assert f"in {len(ranks)} blocks" in solver
        assert ", 0 bytes exchanged" in solver


@pytest.mark.parametrize("name", VARIANTS)
@both
def test_blocks_of_ranks_without_an_output_and_of_frozen_layers(name, ranks):
    for mesh in MESHES[len(ranks)]:
        model = make_variant(name)
        trained = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
        optimizer = tn.DistributedNewton(model.parameters())
        optimizer.solver = Blocked(owners(model, mesh)[trained], combine=True)
        for step in range(2):
            optimizer.step(partial(loss_of_variant, name, model, *make_batch(step)))
        expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        for rank in ranks:
            assert_close(rank["on_variants"][mesh, name], expected, 1e-9)


@both
def test_blocks_are_for_independent_samples_and_gauss_newton(ranks):
    for rank in ranks:
        mixed, hessian = rank["on_mixed_samples"]
        assert "mixes samples" in mixed
        assert "blocks of Hessian" in hessian


@both
def test_own_features_are_enough(ranks):
    expected, _, _ = train(METHODS["newton"], make_model(), 2)
    for rank in ranks:
        assert_close(rank["on_features"][0], expected)


@both
def test_layers_between_other_modules(ranks):
    expected, _, _ = train(METHODS["newton"], make_residual(), 2)
    for rank in ranks:
        assert_close(rank["on_other_modules"][0], expected)


@both
def test_products_of_a_loss_with_derivatives_inside(ranks):
    for rank in ranks:
        for found, expected in zip(rank["on_products"], products(make_model()), strict=True):
            assert_close(found, expected)


@both
def test_numbers_of_parts_are_those_of_the_whole(ranks):
    params = [p.detach() for p in make_model().parameters()]
    number = float(sum((p * p.cos()).sum() for p in params)) + 5.0
    for rank in ranks:
        (outside, finite), (inside, finite_inside), (_, messages) = rank["on_numbers"]
        for found in (outside, inside):
            assert found == pytest.approx([number, 2.0, True], rel=1e-13)
        assert not finite
        assert not finite_inside
        assert messages == 5  # one for each number, and a closer look at what is not finite


@both
def test_copies_and_empty_parts(ranks):
    torch.manual_seed(1)
    narrow = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)).double()
    expected = [train(METHODS["newton"], model, 2)[0] for model in (make_model().float().double(), narrow)]
    for rank in ranks:
        for (found, _, spent), by_one in zip(rank["on_copies"], expected, strict=True):
            assert_close(found, by_one)
            assert spent[1][1] > 0


@both
def test_a_mesh_of_some_of_the_processes(ranks):
    expected, _, _ = train(METHODS["newton"], make_model(), 2)
    for rank in ranks:
        (theta, _, spent), message = rank["on_part_of_the_processes"]
        assert_close(theta, expected)
        assert (spent[1][1] > 0) == (len(ranks) == 4)  # with two ranks every mesh has one
        assert "must hold all processes" in message


@both
def test_misuse_is_named(ranks):
    for rank in ranks:
        line, conv, tied, again, empty, hooked, direct, features = rank["on_misuse"]
        assert "1 dimension(s)" in line
        assert "0.weight belongs to Conv2d" in conv
        assert "2.weight and 0.weight are one parameter" in tied
        assert "0.weight belongs to CutLinear" in again
        assert "no nn.Linear" in empty
        assert "0 has hooks" in hooked
        assert "have products alone" in direct
        assert "has 4 features; give it all 5 features" in features
