"""The Gauss-Newton matrix as a dense matrix, from the rows of the Jacobian: never by P products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.curvature.jacobian import Jacobian
from torchnewton.record import NotPerSampleError, PerSample, Tape, Term
from torchnewton.vectors import flatten, num_entries, symmetric_product


@dataclass(frozen=True)
class SampleBlock:
    """The rows and output Hessians of the outputs of one term that share a number of samples N.

    `rows` is N × M × P and `hessians` N × M × M, M the numbers a sample has in these outputs.
    """

    rows: Tensor
    hessians: Tensor


def dense_from_blocks(blocks: Sequence[SampleBlock]) -> Tensor:
    """G = Σᵢ JᵢᵀBᵢJᵢ, returned in float64: N·M·P² multiplications and additions in the precision of the rows."""
    left = torch.cat([block.rows.flatten(0, 1) for block in blocks])
    right = torch.cat([torch.bmm(block.hessians, block.rows).flatten(0, 1) for block in blocks])
    return symmetric_product(left, right, torch.float64)


def factor_from_blocks(blocks: Sequence[SampleBlock]) -> Tensor:
    """R with G = RᵀR in float64: the rows of J, weighted by B^½ sample by sample."""
    parts = []
    for block in blocks:
        if block.rows.shape[1] == 1:
            part = block.rows.squeeze(1) * block.hessians.clamp(min=0).sqrt().squeeze(2)
        else:
            values, basis = torch.linalg.eigh(block.hessians.double())
            root = values.clamp(min=0).sqrt().unsqueeze(2) * basis.mT
            part = torch.bmm(root.to(block.rows.dtype), block.rows).flatten(0, 1)
        parts.append(part.double())
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def sample_blocks(tape: Tape) -> list[SampleBlock]:
    """Exact rows ∂zᵢ/∂θ and output Hessians of every sample.

    Checked against ordinary products with random vectors; raises `NotPerSampleError` when the closure mixes samples
    (BatchNorm, a loss over pairs) or a call cannot be taken apart.
    """
    outputs, replay = tape.per_sample()
    blocks = []
    start = 0
    for term in tape.terms:
        again = outputs[start : start + len(term.outputs)]
        start += len(term.outputs)
        groups: dict[int, list[int]] = {}
        for i, z in enumerate(term.outputs):
            if z.dim() == 0:
                raise NotPerSampleError("an output has no sample dimension")
            groups.setdefault(z.shape[0], []).append(i)
        found = {n: _block(term, again, replay, n, members) for n, members in groups.items()}
        _check(term, found, groups)
        blocks += list(found.values())
    return blocks


def _block(term: Term, again: list[Tensor], replay: PerSample, n: int, members: list[int]) -> SampleBlock:
    columns = [(i, m) for i in members for m in range(term.outputs[i].numel() // n)]
    like = term.params[0]
    rows = torch.zeros(n, len(columns), num_entries(term.params), dtype=like.dtype, device=like.device)
    hessians = torch.zeros(n, len(columns), len(columns), dtype=like.dtype, device=like.device)
    parts = rows.split([p.numel() for p in term.params], dim=2)
    for column, (i, m) in enumerate(columns):
        with torch.enable_grad():
            total = again[i].reshape(n, -1)[:, m].sum()
        if total.requires_grad:
            for position, part in replay.rows(total, n):
                parts[position][:, column] += part
        unit = [torch.zeros(y.shape, dtype=y.dtype, device=y.device) for y in term.outputs]
        unit[i].reshape(n, -1)[:, m] = 1
        curved = term.hessian_product(unit)
        hessians[:, :, column] = torch.cat([curved[j].reshape(n, -1) for j in members], dim=1)
    return SampleBlock(rows, hessians)


def _check(term: Term, blocks: dict[int, SampleBlock], groups: dict[int, list[int]]) -> None:
    """Compare Jᵀr and Br for random r with the ordinary products."""
    generator = torch.Generator(device=term.outputs[0].device).manual_seed(0)
    r = [torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device) for z in term.outputs]
    adjoint = flatten(term.jacobian_adjoint(r))
    curved = term.hessian_product(r)
    from_rows = torch.zeros_like(adjoint)
    agree = True
    for n, block in blocks.items():
        u = torch.cat([r[i].reshape(n, -1) for i in groups[n]], dim=1).to(block.rows.dtype)
        from_rows += u.reshape(-1) @ block.rows.reshape(u.numel(), -1)
        expected = torch.cat([curved[i].reshape(n, -1) for i in groups[n]], dim=1).to(u.dtype)
        agree &= _close(torch.einsum("nab,nb->na", block.hessians, u), expected, r[0].dtype)
    if not agree or not _close(from_rows, adjoint, r[0].dtype):
        raise NotPerSampleError("the closure mixes samples, as BatchNorm in training mode does")


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    tolerance = torch.finfo(dtype).eps ** 0.5
    return bool((found - expected).norm() <= tolerance * expected.norm())


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
