"""Random cotangents at the network outputs whose covariance is the output Hessian B."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchnewton.curvature.groups import form_of_outputs, output_groups
from torchnewton.curvature.output_root import output_root
from torchnewton.curvature.shared import Rows, Shared, rows_of
from torchnewton.record import NotPerSampleError, RecordError, Tape, Term

_PROBES = 10  # for a B that has no root by samples


def sampled_cotangents(tape: Tape, generator: torch.Generator, shared: Shared | None = None) -> list[list[Tensor]]:
    """For every term u like its outputs, with E[u] = 0 and E[uuᵀ] = B = ∂²f/∂z².

    u = Rε for random signs ε and B = RRᵀ. With labels drawn from the model's own distribution in the place of ε, u has
    the same second moments, but losses other than likelihoods have no such labels.

    - B diagonal (squared error, binary cross entropy, …): R = B^½;
    - cross entropy, B = α(diag p − ppᵀ) at every place: R = √α(diag √p − p√pᵀ);
    - any other loss: the root of the block of every sample, from an eigendecomposition;
    - where B mixes samples or is indefinite: R = (diag B)^½, negative entries set to 0, from 10 products with B.

    Several processes (`shared`, with generators in the same state) find the form together, and draw the numbers that
    one with all samples would draw. Where they have other outputs than others, or no samples, each goes its own way,
    with numbers of its own; the generators are in the same state again afterwards.

    Cost: two products with B for the first two, M and 10 for the others, M the numbers a sample has in the outputs;
    over several processes a short message, one for each term and two for each output.
    """
    shared = shared or Shared()
    forms = shared.told(form_of_outputs(tape, shared))
    unsplit = [rank for rank, form in enumerate(forms) if not form[0]]
    if unsplit:
        tape.require_split()
        raise RecordError(f"no split of the loss of rank {unsplit[0]} was found; its own output tells more.")
    if any(form != forms[0] for form in forms):
        seed = int(torch.randint(2**62, (), generator=generator)) + shared.rank
        generator, shared = torch.Generator().manual_seed(seed), Shared()
    return [_of_term(tape, number, generator, shared) for number in range(len(tape.terms))]


def _of_term(tape: Tape, number: int, generator: torch.Generator, shared: Shared) -> list[Tensor]:
    term = tape.terms[number]
    rows = rows_of(term.outputs, shared)
    found = [_of_output(term, i, generator, rows[i], shared) for i in range(len(term.outputs))]
    cotangents = [u for u in found if u is not None]
    return cotangents if len(cotangents) == len(found) else _general(tape, number, generator, rows, shared)


def _of_output(term: Term, i: int, generator: torch.Generator, rows: Rows, shared: Shared) -> Tensor | None:
    """u for one output; None where B has no known form there or couples it with other outputs."""
    z = term.outputs[i].detach()

    def product(v: Tensor) -> list[Tensor]:
        parts = [torch.zeros_like(y, memory_format=torch.contiguous_format) for y in term.outputs]
        parts[i] += v
        return term.hessian_product(parts)

    probe = rows.uniform(z, generator)
    curved = product(probe)
    if shared.sums([float(any(bool(y.any()) for j, y in enumerate(curved) if j != i))])[0]:
        return None
    diagonal = product(torch.ones_like(z))[i]
    if _close(diagonal * probe, curved[i], shared):
        return diagonal.clamp(min=0).sqrt() * rows.signs(z, generator)
    for dim in sorted({min(1, z.dim() - 1), z.dim() - 1}):
        p = z.softmax(dim)
        unit = p * probe - p * (p * probe).sum(dim, keepdim=True)
        size = unit.square().sum(dim, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
        alpha = (unit * curved[i]).sum(dim, keepdim=True) / size
        if _close(alpha * unit, curved[i], shared):
            u = p.sqrt() * rows.signs(z, generator)
            return alpha.clamp(min=0).sqrt() * (u - p * u.sum(dim, keepdim=True))
    return None


def _close(found: Tensor, expected: Tensor, shared: Shared) -> bool:
    error, size = shared.sums([float(x.norm()) ** 2 for x in (found - expected, expected)])
    rounding: float = torch.finfo(found.dtype).eps ** 0.65
    return math.sqrt(error) <= rounding * math.sqrt(size)


def _general(tape: Tape, number: int, generator: torch.Generator, rows: list[Rows], shared: Shared) -> list[Tensor]:
    term = tape.terms[number]
    groups = [group for group in output_groups(tape) if group.term == number]
    try:
        roots = [output_root(term, group) for group in groups]
    except NotPerSampleError:
        roots = []
    has_failed = len(roots) < len(groups)
    if shared.sums([float(has_failed)])[0] or has_failed:
        return _diagonal(term, generator, rows)
    u = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in term.outputs]
    for group, root in zip(groups, roots, strict=True):
        like = torch.empty(group.num_samples, root.width, dtype=u[0].dtype, device=u[0].device)
        group.add(root.spread(rows[group.members[0]].signs(like, generator)), u)
    return u


def _diagonal(term: Term, generator: torch.Generator, rows: list[Rows]) -> list[Tensor]:
    total = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in term.outputs]
    for _ in range(_PROBES):
        probe = [r.signs(z, generator) for r, z in zip(rows, term.outputs, strict=True)]
        for t, v, y in zip(total, probe, term.hessian_product(probe), strict=True):
            t += v * y / _PROBES
    return [t.clamp(min=0).sqrt() * r.signs(t, generator) for r, t in zip(rows, total, strict=True)]
