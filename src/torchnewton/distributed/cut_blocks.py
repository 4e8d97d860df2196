"""The diagonal blocks of a Gauss-Newton matrix that belong to what the ranks hold of a model cut by `partition`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchnewton.curvature import Diagonal, GaussNewton, LinearOperator
from torchnewton.curvature.operator import Scaled, Shifted, Sum
from torchnewton.distributed.axes import Axes, Call
from torchnewton.distributed.processes import Processes
from torchnewton.record.graph import Edge, filled, grad, walk
from torchnewton.vectors import Vector, norm, zeros_like

_MIXED = (
    "Diagonalized: the model mixes samples, or calls a layer in a way that its blocks cannot be told from; use an "
    "exact method (NewtonCG) on a model that tn.partition has cut."
)


class CutBlocks:
    """Vectors like the parameters of a cut model, and what this rank solves for: its parts of them.

    A bias is on all ranks that hold the same outputs; the first of them solves for it.
    """

    def __init__(self, params: Sequence[Tensor], axes: Axes) -> None:
        if axes.ranks is None:
            raise ValueError("Diagonalized: the mesh of tn.partition must hold all processes.")
        self.params = list(params)
        self.axes = axes
        self.processes: Processes = axes.ranks.processes
        self.owned = [i for i, p in enumerate(self.params) if _is_first(p)]

    @property
    def spent(self) -> int:
        """Bytes exchanged so far."""
        return self.axes.bytes

    def cut(self, v: Sequence[Tensor]) -> Vector:
        """What this rank solves for."""
        return [_local(v[i]) for i in self.owned]

    def joined(self, d: Sequence[Tensor], like: Sequence[Tensor]) -> Vector:
        """Every rank's part, in its place; a bias from the rank that has solved for it."""
        found = dict(zip(self.owned, d, strict=True))
        local = [found[i] if i in found else torch.zeros_like(_local(x)) for i, x in enumerate(like)]
        for axis in self.axes.axes:
            shared = [i for i, x in enumerate(like) if _is_copied(x, axis.dim)]
            if shared and axis.size > 1:
                for i, total in zip(shared, axis.processes.sum([local[i] for i in shared]), strict=True):
                    local[i] = total
        return [_distributed(part, x) for part, x in zip(local, like, strict=True)]

    def block(self, A: LinearOperator) -> LinearOperator:
        """That of a shifted, scaled or summed Gauss-Newton matrix."""
        if isinstance(A, Shifted):
            return Shifted(self.block(A.base), A.shift)
        if isinstance(A, Scaled):
            return Scaled(self.block(A.base), A.factor)
        if isinstance(A, Sum):
            return Sum(self.block(A.first), self.block(A.second))
        if isinstance(A, Diagonal):
            return Diagonal(self.cut(A.entries))
        if isinstance(A, GaussNewton):
            return CutBlock(A, self)
        raise ValueError(
            f"Diagonalized: the blocks of {type(A).__name__} on a cut model are not known: use GaussNewton."
        )


class CutBlock(LinearOperator):
    """Gₚₚ = Σ JₚᵀBJₚ on rank p, by explicit factors: the input xₙ of each of its blocks and ∂zₙ/∂yₙ of its output.

        Jₚv = Σ over its layers  ∂z/∂y · (xVᵀ + v_b)

    Shapes: vectors are what `CutBlocks.cut` gives. Products exchange nothing.
    A sample is a row of a layer's input; z has equally many numbers for each, one after the other. What is frozen has
    no block.

    Cost: C backward passes with their exchanges before the first product, C the numbers a sample has in the outputs,
    and one more to check; then for each layer two products with its block and two passes over N·C·outputs numbers.
    Memory: those numbers.
    Errors: `ValueError` where the samples are not independent of each other.
    Source: arXiv 1802.00130: an explicit Jacobian in the products, so that diagonal blocks need no communication.
    """

    def __init__(self, base: GaussNewton, blocks: CutBlocks) -> None:
        pieces = blocks.cut([p.detach() for p in base.domain])
        super().__init__(pieces, pieces, is_symmetric=True, is_positive_semidefinite=base.is_positive_semidefinite)
        self.base = base
        self.position = {id(blocks.params[i]): k for k, i in enumerate(blocks.owned)}
        edges = [edge for term in base.tape.terms for edge in term.edges]
        nodes = {node: getattr(node, "call", None) for node, _ in walk(edges)}
        found = {node: call for node, call in nodes.items() if isinstance(call, Call)}
        self.calls = list(found.values())
        places: list[Edge] = [(node, 0) for node in found]
        counts = {len(_rows(call.x)) for call in self.calls}
        if len(counts) != 1 or any(z.numel() % max(max(counts), 1) for z in base.tape.outputs):
            raise ValueError(_MIXED)
        (self.num_samples,) = counts
        self.slopes = [
            _slopes(z, edge, places, self.num_samples) for z, edge in zip(base.tape.outputs, edges, strict=True)
        ]
        self._check_samples(edges, blocks)

    def _check_samples(self, edges: Sequence[Edge], blocks: CutBlocks) -> None:
        """Jᵀu of a random u, by the factors and by a backward pass; the same verdict on all ranks."""
        generator = torch.Generator().manual_seed(0)
        u = [torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device) for z in self.base.tape.outputs]
        expected = blocks.cut(filled(grad(edges, blocks.params, u), blocks.params))
        error = norm([a - b for a, b in zip(self._adjoint(u), expected, strict=True)])
        eps = torch.finfo(u[0].dtype).eps
        if any(row[0] for row in blocks.processes.table([not error <= eps**0.5 * max(norm(expected), 1e-30)])):
            raise ValueError(_MIXED)

    def apply(self, v: Sequence[Tensor]) -> Vector:
        """See `LinearOperator.apply`."""
        return self._adjoint(self.base.curved(self._moved(v)))

    def _part(self, p: Tensor | None, v: Sequence[Tensor]) -> Tensor | None:
        return None if p is None or id(p) not in self.position else v[self.position[id(p)]]

    def _moved(self, v: Sequence[Tensor]) -> Vector:
        """Jₚv."""
        total = zeros_like(self.base.tape.outputs)
        for k, call in enumerate(self.calls):
            V, v_b = self._part(call.weight, v), self._part(call.bias, v)
            if V is not None:
                y = F.linear(_rows(call.x), V, v_b)
            elif v_b is not None:
                y = v_b.expand(self.num_samples, -1)
            else:
                continue
            for z, slopes in zip(total, self.slopes, strict=True):
                if slopes[k]:
                    z += torch.stack([(slope * y).sum(-1) for slope in slopes[k]], dim=-1).view_as(z)
        return total

    def _adjoint(self, u: Sequence[Tensor]) -> Vector:
        """Jₚᵀu."""
        total = zeros_like(self.domain)
        for k, call in enumerate(self.calls):
            W, bias = self._part(call.weight, total), self._part(call.bias, total)
            parts = [
                slope * weight[:, None]
                for z, slopes in zip(u, self.slopes, strict=True)
                for slope, weight in zip(slopes[k], z.reshape(self.num_samples, -1).unbind(-1), strict=False)
            ]
            if not parts:
                continue
            delta = sum(parts[1:], parts[0])
            if W is not None:
                W += delta.mT @ _rows(call.x)
            if bias is not None:
                bias += delta.sum(0)
        return total

    @property
    def path(self) -> str:
        """How products are made."""
        return "explicit factors of the rank's blocks"


def _slopes(z: Tensor, edge: Edge, places: Sequence[Edge], num_samples: int) -> list[list[Tensor]]:
    """∂z_c/∂y of all samples at once: by call, then by c, samples × outputs; none where z does not depend on a call."""
    by_class = []
    for c in range(z.numel() // max(num_samples, 1)):
        u = torch.zeros(num_samples, z.numel() // num_samples, dtype=z.dtype, device=z.device)
        u[:, c] = 1
        by_class.append(grad([edge], places, [u.view(z.shape)]))
    return [[_rows(g) for row in by_class if (g := row[k]) is not None] for k in range(len(places))]


def _rows(x: Tensor) -> Tensor:
    """Everything but the last dimension counts as samples; it may be empty."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _local(x: Tensor) -> Tensor:
    assert isinstance(x, DTensor)  # for mypy
    return x.to_local()


def _distributed(part: Tensor, like: Tensor) -> Tensor:
    assert isinstance(like, DTensor)  # for mypy
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _is_copied(x: Tensor, dim: int) -> bool:
    """Whether the ranks along this axis have the same part."""
    assert isinstance(x, DTensor)  # for mypy
    return x.placements[dim].is_replicate()


def _is_first(x: Tensor) -> bool:
    """Whether this rank is the first of those that have the same part."""
    assert isinstance(x, DTensor)  # for mypy
    here = x.device_mesh.get_coordinate()
    assert here is not None  # for mypy: every process of the mesh
    return all(coordinate == 0 or not _is_copied(x, dim) for dim, coordinate in enumerate(here))
