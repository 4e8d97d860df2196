"""Square roots of the output Hessians B: what turns a Jacobian into a factor of the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.groups import OutputGroup, uncoupled
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

    def dense(self) -> OutputRoot:
        """The same with R as N × M × r."""
        if self.values.dim() == 3:
            return self
        inverse = torch.where(self.values == 0, 0.0, 1 / self.values)
        return OutputRoot(torch.diag_embed(self.values), torch.diag_embed(inverse))

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

    Outputs that share no loss have roots of their own, side by side. Each form is taken only if a product with a random
    vector agrees in every sample. Raises `NotPerSampleError` where B mixes samples, is not positive semidefinite, or is
    not diagonal and has more than `MOST_ENTRIES` numbers.
    """
    parts = uncoupled(term, group)
    roots = [_of_part(term, part) for part in parts]
    return roots[0] if len(roots) == 1 else _side_by_side(term, group, parts, roots)


def _of_part(term: Term, group: OutputGroup) -> OutputRoot:
    z = group.join(term.outputs).detach()

    def product(u: Tensor) -> Tensor:
        parts = [torch.zeros_like(y, memory_format=torch.contiguous_format) for y in term.outputs]
        group.add(u, parts)
        return group.join(term.hessian_product(parts))

    generator = torch.Generator(device=z.device).manual_seed(0)
    probe = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    curved = product(probe)
    widths = _widths(term, group)
    root = _diagonal(product, probe, curved, widths)
    if root is None:
        _refuse_large(group.num_samples, group.width, group.width)
    if root is None and len(group.members) == 1:
        shape = term.outputs[group.members[0]].shape
        for dim in {1, len(shape) - 1} if len(shape) > 1 else ():
            root = root or _softmax(product, z.view(shape), dim, probe, curved, _is_cross_entropy(term, group))
    return root or _general(product, probe, curved, widths)


def _side_by_side(term: Term, group: OutputGroup, parts: list[OutputGroup], roots: list[OutputRoot]) -> OutputRoot:
    """The root of a group of uncoupled parts."""
    starts = dict(zip(group.members, accumulate(_widths(term, group), initial=0), strict=False))
    columns = [
        [c for i, w in zip(part.members, _widths(term, part), strict=True) for c in range(starts[i], starts[i] + w)]
        for part in parts
    ]
    n, like = group.num_samples, roots[0].values
    if all(root.values.dim() == 2 for root in roots):
        values = like.new_empty(n, group.width)
        for root, at in zip(roots, columns, strict=True):
            values[:, at] = root.values
        return OutputRoot(values)
    width = sum(root.width for root in roots)
    _refuse_large(n, group.width, width)
    values, inverse = like.new_zeros(n, group.width, width), like.new_zeros(n, width, group.width)
    start = 0
    for root, at in zip(roots, columns, strict=True):
        stop, dense = start + root.width, root.dense()
        values[:, at, start:stop] = dense.values
        inverse[:, start:stop, at] = float("nan") if dense.inverse is None else dense.inverse
        start = stop
    return OutputRoot(values, inverse)


def _widths(term: Term, group: OutputGroup) -> list[int]:
    """The numbers that a sample has in each member."""
    return [term.outputs[i].numel() // group.num_samples for i in group.members]


def _refuse_large(num_samples: int, rows: int, columns: int) -> None:
    if num_samples * rows * columns > MOST_ENTRIES:
        raise NotPerSampleError(f"{num_samples} roots of output Hessians, {rows}×{columns} each, are too many")


def _is_cross_entropy(term: Term, group: OutputGroup) -> bool:
    edges = {term.edges[i] for i in group.members}
    return all(piece.name in _CROSS_ENTROPIES for piece in term.pieces if edges & set(piece.edges))


def _diagonal(product: Product, probe: Tensor, curved: Tensor, widths: list[int]) -> OutputRoot | None:
    diagonal = product(torch.ones_like(probe))
    pairs = zip((diagonal * probe).split(widths, 1), curved.split(widths, 1), strict=True)
    if not all(_close(found, expected) for found, expected in pairs):
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


def _general(product: Product, probe: Tensor, curved: Tensor, widths: list[int]) -> OutputRoot:
    columns = []
    for i in range(probe.shape[1]):
        unit = torch.zeros_like(probe)
        unit[:, i] = 1
        columns.append(product(unit))
    B = torch.stack(columns, dim=2)
    difference = torch.bmm(B, probe.unsqueeze(2)).squeeze(2) - curved
    error, size = (torch.stack([part.norm() for part in x.split(widths, 1)]) for x in (difference, curved))
    if not _is_rounding(error, size):
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
    """Whether the two agree to rounding in every row, relative to that row of `scale` or of the second."""
    return _is_rounding((found - expected).norm(dim=-1), (expected if scale is None else scale).norm(dim=-1))


def _is_rounding(error: Tensor, size: Tensor) -> bool:
    """Whether each error is one of rounding for its size, or for the largest of all."""
    largest = size.max() if size.numel() else size.sum()
    return bool((error <= _rtol(error.dtype) * size + 10 * torch.finfo(error.dtype).eps * largest).all())


def _rtol(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps ** 0.65)
