"""Square roots of the output Hessians B: what turns a Jacobian into a factor of the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.groups import OutputGroup
from torchnewton.record import NotPerSampleError, Term

MOST_ENTRIES = 2e8  # numbers of all roots together

Product = Callable[[Tensor], Tensor]

_CROSS_ENTROPIES = {"cross_entropy", "nll_loss", "kl_div"}


@dataclass(frozen=True)
class OutputRoot:
    """R with B = RRᵀ for every sample: `values` is N × M (R diagonal) or N × M × r.

    `inverse`, where given, is R⁺ as N × r × M.
    """

    values: Tensor
    inverse: Tensor | None = None

    @property
    def width(self) -> int:
        """r, the columns of R."""
        return self.values.shape[-1]

    def weigh(self, rows: Tensor) -> Tensor:
        """Rᵀ · rows for rows N × M × T."""
        if self.values.dim() == 2:
            return self.values.unsqueeze(2).to(rows.dtype) * rows
        return torch.bmm(self.values.mT.to(rows.dtype), rows)

    def solve(self, s: Tensor) -> Tensor:
        """R⁺s, N × r, for s N × M; NaN where it is not known."""
        if self.values.dim() == 2:
            return torch.where(s == 0, 0.0, s / self.values)
        if self.inverse is None:
            return s.new_full((len(s), self.width), float("nan"))
        return torch.bmm(self.inverse, s.unsqueeze(2)).squeeze(2)

    def spread(self, w: Tensor) -> Tensor:
        """R · w, N × M, for w N × r."""
        if self.values.dim() == 2:
            return self.values.to(w.dtype) * w
        return torch.bmm(self.values.to(w.dtype), w.unsqueeze(2)).squeeze(2)


def output_root(term: Term, group: OutputGroup) -> OutputRoot:
    """The root of ∂²f/∂z² for one group of outputs, from two products with it where it has a known form.

    - squared error, binary cross entropy and every loss that treats its entries apart: B is diagonal;
    - cross entropy with any weights, smoothing, soft or ignored labels: B = α(diag p − ppᵀ), p the softmax of z and α a
      number of each sample. R = √α · diag(√p) · Q with the C − 1 columns of Q orthogonal to √p: one less than classes;
    - any other: the M columns of B and an eigendecomposition for every sample.

    Each form is taken only if a product with a random vector agrees. Raises `NotPerSampleError` where B mixes samples,
    is not positive semidefinite, or is not diagonal and has more than `MOST_ENTRIES` numbers.
    """
    z = group.join(term.outputs).detach()

    def product(u: Tensor) -> Tensor:
        parts = [torch.zeros_like(y, memory_format=torch.contiguous_format) for y in term.outputs]
        group.add(u, parts)
        return group.join(term.hessian_product(parts))

    generator = torch.Generator(device=z.device).manual_seed(0)
    probe = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    curved = product(probe)
    root = _diagonal(product, probe, curved)
    if root is None and probe.numel() * group.width > MOST_ENTRIES:
        raise NotPerSampleError(f"{group.num_samples} output Hessians of {group.width}×{group.width} are too many")
    if root is None and len(group.members) == 1:
        shape = term.outputs[group.members[0]].shape
        for dim in {1, len(shape) - 1} if len(shape) > 1 else ():
            root = root or _softmax(product, z.view(shape), dim, probe, curved, _is_cross_entropy(term, group))
    return root or _general(product, probe, curved)


def _is_cross_entropy(term: Term, group: OutputGroup) -> bool:
    edges = {term.edges[i] for i in group.members}
    return all(piece.name in _CROSS_ENTROPIES for piece in term.pieces if edges & set(piece.edges))


def _diagonal(product: Product, probe: Tensor, curved: Tensor) -> OutputRoot | None:
    diagonal = product(torch.ones_like(probe))
    if not _close(diagonal * probe, curved):
        return None
    return OutputRoot(_nonnegative(diagonal, diagonal.abs().amax()).sqrt())


def _softmax(
    product: Product, z: Tensor, dim: int, probe: Tensor, curved: Tensor, is_cross_entropy: bool
) -> OutputRoot | None:
    """With classes in dimension `dim`; the dimensions between samples and classes are places with a B each.

    The product with B is compared up to the rounding of p ⊙ u where the loss is known to be a cross entropy: what is
    left of it in a fitted sample is less than that. Any other B must agree to its own rounding.
    """
    n, classes = z.shape[0], z.shape[dim]
    p = z.softmax(dim).movedim(dim, -1)

    def moved(x: Tensor) -> Tensor:
        return x.reshape(z.shape).movedim(dim, -1)

    def unit_product(u: Tensor) -> Tensor:
        return p * u - p * (p * u).sum(-1, keepdim=True)

    # zero at the most probable class: no cancellation where a sample is fitted and B all but vanishes
    k = p.argmax(-1, keepdim=True)
    rest = torch.ones_like(p).scatter(-1, k, 0.0)
    unit, found = unit_product(rest), moved(product(rest.movedim(-1, dim).reshape(n, -1)))
    alpha = (unit * found).sum(-1, keepdim=True) / (unit * unit).sum(-1, keepdim=True)
    alpha = torch.where(unit.abs().amax(-1, keepdim=True) > torch.finfo(z.dtype).tiny ** 0.5, alpha, 0.0)
    u = moved(probe)
    if not _close(alpha * unit_product(u), moved(curved), alpha * p * u if is_cross_entropy else None):
        return None
    q = (_nonnegative(alpha, alpha.abs().amax()) * p).sqrt()
    # Q: all columns but the k-th of the reflection that takes √p to the k-th unit vector
    w = p.sqrt() + (1 - rest)
    w = w / w.norm(dim=-1, keepdim=True)
    others = torch.arange(classes - 1, device=z.device).expand(*p.shape[:-1], -1)
    others = others + (others >= k)
    units = F.one_hot(others, classes).mT
    Q = units - 2 * w.unsqueeze(-1) * w.gather(-1, others).unsqueeze(-2)
    root = (q.unsqueeze(-1) * Q).reshape(n, -1, classes, classes - 1)
    places = root.shape[1]
    if places == 1:
        inverse = Q.mT / q.unsqueeze(-2)  # for s with Σs = 0, since R's range is that of B
        return OutputRoot(root.squeeze(1), torch.where(q.unsqueeze(-2) == 0, 0.0, inverse))
    full = torch.diag_embed(root.permute(0, 2, 3, 1))  # n × classes × (classes − 1) × places × places
    order = (0, 1, 3, 2, 4) if dim == 1 else (0, 3, 1, 2, 4)
    return OutputRoot(full.permute(order).reshape(n, classes * places, (classes - 1) * places))


def _general(product: Product, probe: Tensor, curved: Tensor) -> OutputRoot:
    columns = []
    for i in range(probe.shape[1]):
        unit = torch.zeros_like(probe)
        unit[:, i] = 1
        columns.append(product(unit))
    B = torch.stack(columns, dim=2)
    if not _close(torch.bmm(B, probe.unsqueeze(2)).squeeze(2), curved):
        raise NotPerSampleError("the loss mixes samples")
    values, basis = torch.linalg.eigh(((B + B.mT) / 2).double())
    values = _nonnegative(values, values.abs().amax().to(probe.dtype))
    return OutputRoot((basis * values.sqrt().unsqueeze(1)).to(probe.dtype))


def _nonnegative(values: Tensor, scale: Tensor) -> Tensor:
    tolerance = max(torch.finfo(torch.float32).eps, _rtol(scale.dtype)) * float(scale)
    if bool((values < -tolerance).any()):
        raise NotPerSampleError("the output Hessian of a loss is not positive semidefinite")
    return values.clamp(min=0)


def _close(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> bool:
    """Whether the two agree to rounding, relative to `scale` or to the second."""
    size = (expected if scale is None else scale).norm()
    return bool((found - expected).norm() <= _rtol(found.dtype) * size)


def _rtol(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps ** 0.65)
