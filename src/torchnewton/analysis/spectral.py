"""Where the eigenvalues of a symmetric operator lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchnewton.analysis.quadrature import Measures, Quadrature, measure
from torchnewton.curvature.estimate import Estimate
from torchnewton.curvature.operator import LinearOperator
from torchnewton.solvers.lanczos import RitzValues

EXACT_SIZE = 2000  # up to so many rows all eigenvalues are computed unless told otherwise
FLAT, FLAT_NAME = 1e-4, "1e-4"  # an eigenvalue of smaller size counts as zero, as in the Entropy-SGD paper


@dataclass(frozen=True)
class Density:
    """A function of λ on a grid with its standard error; `coordinate` is where the grid lies on the axis."""

    grid: Tensor
    coordinate: Tensor
    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a symmetric n×n operator, as far as they were found: see `spectrum`.

    `largest` descends and `smallest` ascends; each value has an eigenvalue within its bound. `known` are the
    eigenvalues that converged, each counted once with weight 1/n; the others share one `Quadrature` a probe. All
    standard errors are those of the mean over the probes, 0 where all eigenvalues are known.
    """

    size: int
    largest: RitzValues
    smallest: RitzValues
    known: Tensor
    probes: tuple[Quadrature, ...]
    num_products: int

    @property
    def is_exact(self) -> bool:
        """Whether every eigenvalue is known."""
        return len(self.known) == self.size

    def mean_of(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """tr f(A)/n and its standard error; f maps k eigenvalues to k values, or to k rows of values."""
        rest = 1 - len(self.known) / self.size
        known = f(self.known).sum(0) / self.size
        if not self.probes:
            return known, torch.zeros_like(known)
        each = torch.stack([torch.tensordot(weights, f(nodes), 1) for nodes, weights in (p.rule for p in self.probes)])
        return known + rest * each.mean(0), rest * each.std(0) / math.sqrt(len(self.probes))

    @property
    def trace(self) -> Estimate[float]:
        """Σᵢ λᵢ."""
        mean, error = self.mean_of(lambda x: x)
        return Estimate(self.size * float(mean), self.size * float(error))

    def share(self, below: float = FLAT) -> Estimate[float]:
        """The share of eigenvalues with |λ| < `below`."""
        return self.share_between(-below, below)

    def share_between(self, low: float, high: float) -> Estimate[float]:
        """The share of eigenvalues in the open interval (low, high)."""
        if not low < high:
            raise ValueError(f"Spectrum.share_between: low={low} must be less than high={high}.")
        mean, error = self.mean_of(lambda x: ((x > low) & (x < high)).double())
        return Estimate(float(mean), float(error))

    def share_bounds(self, low: float, high: float) -> tuple[float, float]:
        """The least and the most `share_between` could become with more iterations of the same probes.

        For certain, so wide where one node stands for all eigenvalues near an end; `halved` says what to expect.
        """
        known = int(((self.known > low) & (self.known < high)).sum())
        rest = (self.size - len(self.known)) / max(1, len(self.probes))
        least, most = (sum(p.bounds(low, high)[i] for p in self.probes) for i in (0, 1))
        return (known + rest * least) / self.size, (known + rest * most) / self.size

    def halved(self) -> Spectrum:
        """The same from half of the iterations of each probe: what differs is not resolved yet."""
        return replace(self, probes=tuple(p.halved() for p in self.probes))

    def density(
        self,
        grid: Tensor | None = None,
        *,
        linear_width: float | None = None,
        width: float | None = None,
        num_points: int = 500,
    ) -> Density:
        """The spectral density, each eigenvalue widened to a normal distribution of standard deviation `width`.

        On the linear axis it is the density in λ and `width` is 1 % of the range unless given. With `linear_width` c
        the axis is x(λ) = asinh(λ/c)/ln 10, linear for |λ| < c and logarithmic beyond, on both sides of 0; then it is
        the share of eigenvalues a decade and `width`, in decades, is 0.1 unless given. ∫ value d(coordinate) = 1.
        """
        for name, value in (("linear_width", linear_width), ("width", width)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Spectrum.density: {name}={value} must be a positive number.")
        to_axis, from_axis = _axis(linear_width)
        low, high = (float(to_axis(x.values[:1])) for x in (self.smallest, self.largest))
        if width is None:
            width = 0.1 if linear_width is not None else 0.01 * (high - low) or 0.01 * abs(high) or 1.0
        if grid is None:
            grid = from_axis(torch.linspace(low - 5 * width, high + 5 * width, num_points, dtype=torch.float64))
        grid, deviation = grid.double(), width
        x: Tensor = to_axis(grid)
        mean, error = self.mean_of(lambda nodes: _normal(x - to_axis(nodes)[:, None], deviation))
        return Density(grid, x, mean, error)

    def __str__(self) -> str:
        return "\n".join(self.summary())

    def summary(self) -> list[str]:
        """What there is to say, in lines."""
        how = "from the dense matrix" if self.is_exact else f"{len(self.known)} of them converged"
        flat, half, trace = self.share(), self.halved().share(), self.trace
        most = self.share_bounds(-FLAT, FLAT)[1]
        lines = [
            f"{self.size} eigenvalues, {how}; {self.num_products} products, {len(self.probes)} probes",
            f"largest   {_listed(self.largest)}",
            f"smallest  {_listed(self.smallest)}",
            f"trace     {trace.value:.5g} ± {trace.standard_error:.1g}",
            f"|λ| < {FLAT_NAME}  {flat.value:.2%} ± {flat.standard_error:.2%}",
        ]
        if not self.is_exact:
            lines[-1] += f", {half.value:.2%} with half of the iterations, at most {most:.2%} with more"
        return lines


def spectrum(
    operator: LinearOperator,
    *,
    num_probes: int = 5,
    num_iterations: int = 150,
    num_extreme: int = 5,
    exact: bool | None = None,
    generator: torch.Generator | None = None,
    on_product: Callable[[int, int], None] = lambda done, total: None,
) -> Spectrum:
    """Extreme eigenvalues, trace and spectral density of a symmetric operator A by stochastic Lanczos quadrature.

        tr f(A)/n = 1/n Σ_{i≤q} f(λᵢ) + (1 − q/n) E_v Σⱼ τⱼ f(θⱼ),    Tsⱼ = θⱼsⱼ,    τⱼ = (e₁ᵀsⱼ)²

    One Lanczos run of `num_iterations` steps gives the `num_extreme` largest and smallest eigenvalues with residual
    bounds; its q converged eigenpairs count exactly. For each of `num_probes` random vectors v orthogonal to these, a
    run on the complement gives T, nodes θ and weights τ. Up to 2000 rows, or with `exact=True`, all eigenvalues are
    those of the dense matrix in float64. A repeated eigenvalue appears once among the extreme ones of a run.

    Cost: (num_probes + 1)·num_iterations products, those of several probes through one `apply_each`, and as many
    orthogonalizations; dense n products and n³ operations. Memory: num_iterations + q vectors; the bases of as many
    probes as 1 GiB holds run together. `on_product(done, total)` is told of the progress.
    Without `generator` the seed is 0.
    Errors: `ValueError` for an operator not declared symmetric, arguments out of range, products that are not finite.
    Source: Golub and Meurant, "Matrices, moments and quadrature", 2010; Ghorbani, Krishnan, Xiao, arXiv 1901.10159.
    Deviations from the latter: converged eigenvalues are taken out, as Papyan (arXiv 1811.07062) does with outliers;
    a logarithmic axis has kernels of one width in decades.

    >>> A = Diagonal([torch.tensor([3.0, 1.0, -2.0, 0.0])])
    >>> found = spectrum(A, num_extreme=1)
    >>> found.largest.values, found.smallest.values, found.trace.value, found.share(below=0.5).value
    (tensor([3.], dtype=torch.float64), tensor([-2.], dtype=torch.float64), 2.0, 0.25)
    """
    _check(operator, num_probes, num_iterations, num_extreme)
    size = operator.shape[0]
    if exact or (exact is None and size <= EXACT_SIZE):
        found = _dense(operator)
    else:
        generator = generator or torch.Generator().manual_seed(0)
        found = measure(operator, num_probes, num_iterations, generator, on_product)
    values, bounds = found.extremes.values, found.extremes.bounds
    smallest = RitzValues(values[:num_extreme], bounds[:num_extreme])
    largest = RitzValues(values.flip(0)[:num_extreme], bounds.flip(0)[:num_extreme])
    return Spectrum(size, largest, smallest, found.known, found.probes, found.num_products)


def _check(A: LinearOperator, num_probes: int, num_iterations: int, num_extreme: int) -> None:
    if not A.is_symmetric:
        raise ValueError(
            f"spectrum: {type(A).__name__} is not declared symmetric (is_symmetric); give one that is, as Hessian is."
        )
    for name, value, least in (
        ("num_probes", num_probes, 2),
        ("num_iterations", num_iterations, 2),
        ("num_extreme", num_extreme, 1),
    ):
        if value < least:
            raise ValueError(f"spectrum: {name}={value} must be at least {least}.")


def _dense(A: LinearOperator) -> Measures:
    """All eigenvalues, from the matrix made exactly symmetric."""
    matrix = A.to_dense().detach().double()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("spectrum: the operator's matrix is not finite; look for NaN in loss and parameters.")
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).cpu()
    return Measures(RitzValues(values, torch.zeros_like(values)), values, (), A.shape[0])


def _axis(linear_width: float | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From λ to the axis and back."""
    if linear_width is None:
        return lambda x: x, lambda x: x
    c, decade = linear_width, math.log(10)
    return lambda x: torch.asinh(x / c) / decade, lambda x: c * torch.sinh(x * decade)


def _normal(x: Tensor, width: float) -> Tensor:
    return torch.exp(-0.5 * (x / width).square()) / (width * math.sqrt(2 * math.pi))


def _listed(found: RitzValues) -> str:
    return ", ".join(f"{x:.4g} ± {b:.0e}" for x, b in zip(found.values.tolist(), found.bounds.tolist(), strict=True))
