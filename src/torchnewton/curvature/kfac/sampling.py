"""Random cotangents at the network outputs whose covariance is the output Hessian B."""

from __future__ import annotations

import torch
from torch import Tensor

from torchnewton.curvature.groups import output_groups
from torchnewton.curvature.output_root import output_root
from torchnewton.record import NotPerSampleError, Tape, Term

_PROBES = 10  # for a B that has no root by samples


def sampled_cotangents(tape: Tape, generator: torch.Generator) -> list[list[Tensor]]:
    """For every term u like its outputs, with E[u] = 0 and E[uuᵀ] = B = ∂²f/∂z².

    u = Rε for random signs ε and B = RRᵀ. With labels drawn from the model's own distribution in the place of ε, u has
    the same second moments, but losses other than likelihoods have no such labels.

    - B diagonal (squared error, binary cross entropy, …): R = B^½;
    - cross entropy, B = α(diag p − ppᵀ) at every place: R = √α(diag √p − p√pᵀ);
    - any other loss: the root of the block of every sample, from an eigendecomposition;
    - where B mixes samples or is indefinite: R = (diag B)^½, negative entries set to 0, from 10 products with B.

    Cost: two products with B for the first two, M and 10 for the others, M the numbers a sample has in the outputs.
    """
    return [_of_term(tape, number, generator) for number in range(len(tape.terms))]


def _of_term(tape: Tape, number: int, generator: torch.Generator) -> list[Tensor]:
    term = tape.terms[number]
    found = [_of_output(term, i, generator) for i in range(len(term.outputs))]
    cotangents = [u for u in found if u is not None]
    return cotangents if len(cotangents) == len(found) else _general(tape, number, generator)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, like.shape, generator=generator, dtype=torch.int8)
    return signs.to(like.device, like.dtype).mul_(2).sub_(1)


def _of_output(term: Term, i: int, generator: torch.Generator) -> Tensor | None:
    """u for one output; None where B has no known form there or couples it with other outputs."""
    z = term.outputs[i].detach()

    def product(v: Tensor) -> list[Tensor]:
        parts = [torch.zeros_like(y, memory_format=torch.contiguous_format) for y in term.outputs]
        parts[i] += v
        return term.hessian_product(parts)

    probe = torch.rand(z.shape, generator=generator).to(z)
    curved = product(probe)
    if any(bool(y.any()) for j, y in enumerate(curved) if j != i):
        return None
    diagonal = product(torch.ones_like(z))[i]
    if _close(diagonal * probe, curved[i]):
        return diagonal.clamp(min=0).sqrt() * _signs(z, generator)
    for dim in sorted({min(1, z.dim() - 1), z.dim() - 1}):
        p = z.softmax(dim)
        unit = p * probe - p * (p * probe).sum(dim, keepdim=True)
        size = unit.square().sum(dim, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
        alpha = (unit * curved[i]).sum(dim, keepdim=True) / size
        if _close(alpha * unit, curved[i]):
            u = p.sqrt() * _signs(z, generator)
            return alpha.clamp(min=0).sqrt() * (u - p * u.sum(dim, keepdim=True))
    return None


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= torch.finfo(found.dtype).eps ** 0.65 * expected.norm())


def _general(tape: Tape, number: int, generator: torch.Generator) -> list[Tensor]:
    term = tape.terms[number]
    u = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in term.outputs]
    try:
        for group in output_groups(tape):
            if group.term == number:
                root = output_root(term, group)
                ones = torch.ones(group.num_samples, root.width, dtype=u[0].dtype, device=u[0].device)
                group.add(root.spread(_signs(ones, generator)), u)
    except NotPerSampleError:
        return _diagonal(term, generator)
    return u


def _diagonal(term: Term, generator: torch.Generator) -> list[Tensor]:
    total = [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in term.outputs]
    for _ in range(_PROBES):
        probe = [_signs(z, generator) for z in term.outputs]
        for t, v, y in zip(total, probe, term.hessian_product(probe), strict=True):
            t += v * y / _PROBES
    return [t.clamp(min=0).sqrt() * _signs(t, generator) for t in total]
