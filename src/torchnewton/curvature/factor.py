"""R with G = RᵀR: the rows of the Jacobian, weighted by the square root of the output Hessian."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchnewton.curvature.cost_model import gram_by_pairs, gram_by_rows
from torchnewton.curvature.groups import output_groups
from torchnewton.curvature.layer_jacobian import LayerJacobian
from torchnewton.curvature.layer_jacobian.factors import Factor, Factors
from torchnewton.curvature.layer_jacobian.layers import Linear, Paired
from torchnewton.curvature.linear_rows import LinearBlock, LinearRows
from torchnewton.curvature.output_root import output_root
from torchnewton.record import NotPerSampleError
from torchnewton.vectors import Vector, flatten, num_entries, symmetric_product, unflatten

SMALL = 1e9  # n²P up to which the Gram matrix of R as a matrix in float64 is cheap
SMALL_BLOCKS = 2e8  # n²ΣO up to which that of linear layers is


class WeightedRows(ABC):
    """R = B^½J with G = RᵀR, n × P: its products, its rows, and its Gram matrix RRᵀ."""

    num_rows: int

    @abstractmethod
    def product(self, v: Sequence[Tensor]) -> Tensor:
        """Rv, n numbers."""

    @abstractmethod
    def adjoint(self, w: Tensor) -> Vector:
        """Rᵀw."""

    def preimage(self, b: Sequence[Tensor]) -> Tensor | None:
        """y with Rᵀy = b, where one is known without a solve."""
        return None

    @abstractmethod
    def gram(self, dtype: torch.dtype) -> Tensor:
        """RRᵀ, computed in `dtype`."""

    @abstractmethod
    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """R itself, in the precision of the parameters or in `dtype`."""

    def normal_equations(self, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """RᵀR and Rᵀy, computed in `dtype`."""
        R = self.rows(dtype)
        return symmetric_product(R, R, dtype), None if y is None else R.mT @ y.to(dtype)

    def double(self) -> StoredRows | LinearRows | None:
        """The same in float64, in products and Gram matrix alike, where that is cheap."""
        like = self.like
        if float(self.num_rows) ** 2 * num_entries(like) > SMALL:
            return None
        return StoredRows(self.rows(torch.float64), [x.double() for x in like], self.preimage)

    @property
    @abstractmethod
    def like(self) -> list[Tensor]:
        """Tensors like the parameters."""

    @abstractmethod
    def diagonal(self) -> Vector:
        """The diagonal of RᵀR."""


class StoredRows(WeightedRows):
    """R as a matrix, for vectors like `like`, with what finds a preimage where something does."""

    def __init__(
        self,
        matrix: Tensor,
        like: Sequence[Tensor],
        preimage: Callable[[Sequence[Tensor]], Tensor | None] | None = None,
    ) -> None:
        self.matrix = matrix
        self._like = list(like)
        self.num_rows = len(matrix)
        self._preimage = preimage

    @property
    def like(self) -> list[Tensor]:
        """See `WeightedRows.like`."""
        return self._like

    def preimage(self, b: Sequence[Tensor]) -> Tensor | None:
        """See `WeightedRows.preimage`."""
        return None if self._preimage is None else self._preimage(b)

    def product(self, v: Sequence[Tensor]) -> Tensor:
        """See `WeightedRows.product`."""
        return self.matrix @ flatten(v).to(self.matrix.dtype)

    def adjoint(self, w: Tensor) -> Vector:
        """See `WeightedRows.adjoint`."""
        return unflatten(self.matrix.mT @ w.to(self.matrix.dtype), self.like)

    def gram(self, dtype: torch.dtype) -> Tensor:
        """See `WeightedRows.gram`."""
        columns = self.matrix.to(dtype).mT
        return symmetric_product(columns, columns, dtype)

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """See `WeightedRows.rows`."""
        return self.matrix if dtype is None else self.matrix.to(dtype)

    def diagonal(self) -> Vector:
        """See `WeightedRows.diagonal`."""
        return unflatten(self.matrix.square().sum(0), self.like)


class LayerRows(WeightedRows):
    """R by layer factors; the matrix itself is formed for `rows` alone.

    The Gram matrix is a sum over the layers. A linear layer with one row of inputs a sample contributes
    (A Aᵀ) ∘ (D Dᵀ), A its inputs and D the weighted cotangents at its outputs; a layer that is used at several places
    of a sample the cheaper of the same, summed over pairs of places, and of rows times rows, formed in slices of
    `chunk_bytes`. A parameter used in several calls goes by rows.

    Cost: RRᵀ n²·ΣO operations for linear layers with O outputs, at most n²P; see `cost_model.gram_flops`.
    Parameters in no explicit layer count in the products; the Gram matrix and the rows need all of them to be explicit
    and raise `NotPerSampleError` otherwise. So does the constructor where B mixes samples or is not positive
    semidefinite.
    Source: the identity is that of Dangel, Tatzel, Hennig, "ViViT", arXiv 2106.02624, section 3.
    """

    def __init__(self, jacobian: LayerJacobian, chunk_bytes: float = 256e6) -> None:
        self.tape = jacobian.tape
        if any(z.dim() == 0 for z in self.tape.outputs):
            raise NotPerSampleError("an output has no sample dimension")
        self.chunk_bytes = chunk_bytes
        self.groups = output_groups(self.tape)
        self.roots = [output_root(self.tape.terms[group.term], group) for group in self.groups]
        self.sizes = [group.num_samples * root.width for group, root in zip(self.groups, self.roots, strict=True)]
        self.num_rows = sum(self.sizes)
        self.factors = Factors(self.tape, *jacobian.explicit, jacobian.max_bytes, self.roots, jacobian.users)

    def product(self, v: Sequence[Tensor]) -> Tensor:
        """See `WeightedRows.product`."""
        parts = [part.reshape(-1) for part in self.factors.product(v)]
        return torch.cat([self.tape.params[0].new_empty(0), *parts])  # no part where no output has samples

    def adjoint(self, w: Tensor) -> Vector:
        """See `WeightedRows.adjoint`."""
        w = w.to(self.tape.params[0].dtype)
        parts = zip(self.groups, w.split(self.sizes), strict=True)
        return self.factors.adjoint([part.view(group.num_samples, -1) for group, part in parts])

    def preimage(self, b: Sequence[Tensor]) -> Tensor | None:
        """−R⁺s for b = −∇f = −Jᵀs, s the slope of the loss at the outputs."""
        entries = list(zip(b, self.tape.descent, strict=True))
        if self.tape.has_rest or not all(x is d or torch.equal(x, d) for x, d in entries):
            return None
        parts = []
        for group, root in zip(self.groups, self.roots, strict=True):
            s = group.join(self.tape.terms[group.term].cotangents).detach()
            y = root.solve(s)
            if not bool((root.spread(y) - s).norm() <= 1e-5 * s.norm()):  # NaN where R has lost a column to rounding
                return None
            parts.append(-y.reshape(-1))
        return torch.cat(parts)

    def gram(self, dtype: torch.dtype) -> Tensor:
        """See `WeightedRows.gram`."""
        self._require_all()
        total = torch.zeros(self.num_rows, self.num_rows, dtype=dtype, device=self.tape.params[0].device)
        for component in self._components:
            if len(component) > 1:
                positions = sorted({p for f in component for p in f.layer.positions})
                columns = self._rows_of(component, positions, dtype).mT
                total += symmetric_product(columns, columns, dtype)
                continue
            (factor,) = component
            start = sum(self.sizes[: factor.group])
            stop = start + self.sizes[factor.group]
            block, cotangents = total[start:stop, start:stop], self._cotangents(factor).to(dtype)
            layer, width = factor.layer, self.roots[factor.group].width
            if isinstance(layer, Paired) and gram_by_pairs(layer, width) < gram_by_rows(layer, width):
                self._add_by_pairs(block, layer, cotangents)
            else:
                for part in layer.columns(cotangents, self.chunk_bytes):
                    columns = part.flatten(0, 1).mT
                    block += symmetric_product(columns, columns, dtype)
        return total

    @property
    def like(self) -> list[Tensor]:
        """See `WeightedRows.like`."""
        return self.tape.params

    def double(self) -> StoredRows | LinearRows | None:
        """See `WeightedRows.double`: by layers where all are linear, with one place and parameters of their own."""
        self._require_all()
        layers = [factor.layer for factor in self.factors.factors]
        linear = all(isinstance(layer, Linear) and layer.places == 1 for layer in layers)
        if not linear or any(len(component) > 1 for component in self._components):
            return super().double()
        if float(self.num_rows) ** 2 * sum(layer.output_shape[-1] for layer in layers) > SMALL_BLOCKS:
            return None
        blocks = [self._block(factor) for factor in self.factors.factors]
        return LinearRows(blocks, self.num_rows, self.tape.params, self.preimage)

    def _block(self, factor: Factor) -> LinearBlock:
        layer, D = factor.layer, self._cotangents(factor).double()
        a = layer.input.double().flatten(1)
        n, columns = len(a), [a] if layer.weight_position is not None else []
        if layer.bias_position is not None:
            columns.append(a.new_ones(n, 1))
        start, inputs = sum(self.sizes[: factor.group]), torch.cat(columns, dim=1)
        return LinearBlock(start, inputs, D.flatten(2), layer.weight_position, layer.bias_position)

    def rows(self, dtype: torch.dtype | None = None) -> Tensor:
        """See `WeightedRows.rows`."""
        self._require_all()
        params = self.tape.params
        return self._rows_of(self.factors.factors, range(len(params)), dtype or params[0].dtype)

    def diagonal(self) -> Vector:
        """See `WeightedRows.diagonal`: a matrix product for a linear layer with one place, else from the rows."""
        self._require_all()
        params = self.tape.params
        total = [torch.zeros_like(p) for p in params]
        for component in self._components:
            layer = component[0].layer
            if len(component) == 1 and isinstance(layer, Linear) and layer.places == 1:
                D = self._cotangents(component[0]).flatten(2).square().sum(1)
                for position, entries in layer.adjoint_of(D, layer.input.flatten(1).square()):
                    total[position] = entries.view_as(params[position])
                continue
            positions = sorted({p for f in component for p in f.layer.positions})
            squares = self._rows_of(component, positions, params[0].dtype).square().sum(0)
            for position, part in zip(positions, squares.split([params[p].numel() for p in positions]), strict=True):
                total[position] = part.view_as(params[position])
        return total

    def _require_all(self) -> None:
        if not self.factors.is_complete:
            raise NotPerSampleError("some parameters are used in calls without explicit factors")

    @cached_property
    def _components(self) -> list[list[Factor]]:
        """The factors, those that share parameters together."""
        found: list[list[Factor]] = []
        for factor in self.factors.factors:
            touching = [c for c in found if any(set(f.layer.positions) & set(factor.layer.positions) for f in c)]
            merged = [f for c in touching for f in c] + [factor]
            found = [c for c in found if c not in touching] + [merged]
        return found

    def _cotangents(self, factor: Factor) -> Tensor:
        """Rows of B^½ ∂z/∂s: N × r × shape of a sample of s."""
        return factor.at_output(factor.cotangents.dense())

    def _add_by_pairs(self, total: Tensor, layer: Paired, cotangents: Tensor) -> None:
        """Add Σ over pairs of places (l, k) of (aₗ·aₖ)(Dₗ·Dₖ)."""
        D = layer.cotangents(cotangents).squeeze(2).movedim(-1, 2)  # N × r × L × O
        n, r, places, _ = D.shape
        A = layer.inputs().to(D.dtype).reshape(n * places, -1)
        inner = symmetric_product(A.mT, A.mT, D.dtype) if layer.weight_position is not None else D.new_zeros(1, 1)
        if layer.bias_position is not None:
            inner = inner + 1
        inner = inner.expand(n * places, n * places)
        flat = D.reshape(n * r * places, -1)
        if places == 1:
            outer = symmetric_product(flat.mT, flat.mT, D.dtype)
            total.view(n, r, n, r).addcmul_(outer.view(n, r, n, r), inner.view(n, 1, n, 1))
            return
        step = max(1, int(self.chunk_bytes / (r * places * len(flat) * D.element_size())))
        for start in range(0, n, step):
            block = D[start : start + step].reshape(-1, flat.shape[1]) @ flat.mT
            pairs = block.view(-1, r, places, n, r, places)
            weights = inner.view(n, places, n, places)[start : start + step]
            total.view(n, r, n, r)[start : start + step] += torch.einsum("arlbsk,albk->arbs", pairs, weights)

    def _rows_of(self, component: list[Factor], positions: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The rows of these factors in the parameters at these positions."""
        parts: dict[int, list[tuple[int, Tensor]]] = {p: [] for p in positions}
        for factor in component:
            start = sum(self.sizes[: factor.group])
            for position, rows in factor.layer.rows(self._cotangents(factor).to(dtype)):
                parts[position].append((start, rows.flatten(0, 1)))
        return torch.cat([self._columns(p, parts[p], dtype) for p in positions], dim=1)

    def _columns(self, position: int, parts: list[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
        """The rows in one parameter, from those of its uses, each from a row on."""
        if len(parts) == 1 and len(parts[0][1]) == self.num_rows:
            return parts[0][1].to(dtype)
        like = self.tape.params[position]
        total = torch.zeros(self.num_rows, like.numel(), dtype=dtype, device=like.device)
        for start, rows in parts:
            total[start : start + len(rows)] += rows
        return total
