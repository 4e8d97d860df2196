"""Exact rows of the Jacobian where no layer factors are to be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchnewton.curvature.factor import StoredRows
from torchnewton.curvature.groups import OutputGroup, output_groups
from torchnewton.curvature.jacobian import Jacobian
from torchnewton.curvature.output_root import output_root
from torchnewton.record import NotPerSampleError, PerSample, Tape
from torchnewton.vectors import flatten, num_entries

MOST_ROW_ENTRIES = 5e8  # numbers of the rows
MOST_ALONE = 20  # outputs whose rows take a backward pass each


def replayed_rows(tape: Tape) -> StoredRows:
    """R = B^½J from a replay of the closure in which every sample has its own copy of the parameters.

    It holds for derivatives inside the loss as well. Cost: a forward pass and a backward pass for each of the M numbers
    a sample has in the outputs. Checked against ordinary products with random vectors. Where that cannot be, up to
    `MOST_ALONE` outputs take a backward pass each: an initial value, an integral. Raises `NotPerSampleError` when the
    closure mixes samples (BatchNorm, a loss over pairs), a call cannot be taken apart, or there are more than
    `MOST_ROW_ENTRIES` numbers.
    """
    groups, size = output_groups(tape), num_entries(tape.params)
    if not groups:
        raise NotPerSampleError("there are no outputs")
    if sum(group.num_samples * group.width for group in groups) * size > MOST_ROW_ENTRIES:
        raise NotPerSampleError(f"the rows of the Jacobian, {size} numbers each, are too many")
    parts = []
    replayed: tuple[list[Tensor], PerSample] | None = None
    for group in groups:
        try:
            if group.num_samples == 1:
                raise NotPerSampleError("an output has no sample dimension")
            outputs, replay = replayed = replayed or tape.per_sample()
            rows = _rows(tape, tape.of_term(outputs, group.term), replay, group)
            _check(tape, group, rows)
        except NotPerSampleError:
            if group.num_samples * group.width > MOST_ALONE:
                raise
            rows = _rows_alone(tape, group)
        parts.append(output_root(tape.terms[group.term], group).weigh(rows).flatten(0, 1))
    return StoredRows(torch.cat(parts) if len(parts) > 1 else parts[0], tape.params)


def _rows_alone(tape: Tape, group: OutputGroup) -> Tensor:
    """∂z/∂θ, N × M × P, by a backward pass for each number."""
    term, rows = tape.terms[group.term], []
    for i in range(group.num_samples * group.width):
        unit = torch.zeros(group.num_samples, group.width, dtype=tape.params[0].dtype, device=tape.params[0].device)
        unit.view(-1)[i] = 1
        parts = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in term.outputs]
        group.add(unit, parts)
        rows.append(flatten(term.jacobian_adjoint(parts)))
    return torch.stack(rows).view(group.num_samples, group.width, -1)


def _rows(tape: Tape, again: list[Tensor], replay: PerSample, group: OutputGroup) -> Tensor:
    """∂z/∂θ, N × M × P."""
    n, like = group.num_samples, tape.params[0]
    rows = torch.zeros(n, group.width, num_entries(tape.params), dtype=like.dtype, device=like.device)
    parts = rows.split([p.numel() for p in tape.params], dim=2)
    with torch.enable_grad():
        joined = group.join(again)
    for column in range(group.width):
        with torch.enable_grad():
            total = joined[:, column].sum()
        if total.requires_grad:
            for position, part in replay.rows(total, n):
                parts[position][:, column] += part
    return rows


def _check(tape: Tape, group: OutputGroup, rows: Tensor) -> None:
    """Compare Jᵀr for a random r with the ordinary product."""
    term = tape.terms[group.term]
    generator = torch.Generator(device=rows.device).manual_seed(0)
    r = torch.randn(rows.shape[:2], generator=generator, dtype=rows.dtype, device=rows.device)

    def product(r: Tensor) -> Tensor:
        parts = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in term.outputs]
        group.add(r, parts)
        return flatten(term.jacobian_adjoint(parts))

    require_agreement(r.reshape(-1) @ rows.flatten(0, 1), product, r, tape.params)


def require_agreement(found: Tensor, product: Callable[[Tensor], Tensor], r: Tensor, params: Sequence[Tensor]) -> None:
    """Raise `NotPerSampleError` unless `found` is the linear `product(r)`, in every parameter to half its digits.

    A part that should vanish, as of a bias in front of a normalization, is all rounding: how much there is of that
    shows where the product with a sum is not the sum of the products. What is 1e-5 of the whole in float32 passes, too:
    rounding of the forward pass does not show so.
    """
    expected, part = product(r), r.sin()
    rounding = expected - product(part) - product(r - part)
    sizes = [p.numel() for p in params]
    error, size, noise = (
        torch.stack([x.norm() for x in y.split(sizes)]) for y in (found - expected, expected, rounding)
    )
    eps = torch.finfo(found.dtype).eps
    if not bool((error <= eps**0.5 * size + 30 * noise + 100 * eps * size.norm()).all()):
        raise NotPerSampleError("the closure mixes samples, as BatchNorm in training mode does")


def dense_from_rows(tape: Tape, jacobian: Jacobian) -> Tensor:
    """G in float64 from one backward pass and one product with B for each row of J."""
    rows = jacobian.to_dense().double()
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    start = 0
    for term in tape.terms:
        curved = []
        for i, z in enumerate(term.outputs):
            for j in range(z.numel()):
                unit = [torch.zeros(y.shape, dtype=y.dtype, device=y.device) for y in term.outputs]
                unit[i].view(-1)[j] = 1
                curved.append(flatten(term.hessian_product(unit)).double())
        part = rows[start : start + len(curved)]
        total += part.T @ torch.stack(curved) @ part
        start += len(curved)
    return total
