"""K-FAC: running Kronecker factors of the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchnewton.curvature.kfac.blocks import Block, KroneckerBlocks
from torchnewton.curvature.kfac.joining import joined
from torchnewton.curvature.kfac.spectra import Eigenpairs, KroneckerInverse
from torchnewton.curvature.kfac.statistics import Sharing, Statistics
from torchnewton.curvature.shared import Shared
from torchnewton.record import Tape

Positions = tuple[int, ...]


class KFAC:
    """A running approximation of the Gauss-Newton matrix G, block by block, and its damped inverse.

        kfac = tn.KFAC()
        kfac.update(tape)               # once a step; takes statistics when they are due
        M = kfac.inverse(damping)       # M @ v ≈ (G + λI)⁻¹v: a preconditioner, a direction
        kfac.approximation              # G as far as it is known

    For a layer s = Wa + b at N samples, with ā = (a, 1) and δ = ∂⟨u, z⟩/∂s for random u of covariance B = ∂²f/∂z²:

        G ≈ L ⊗ R for [W b],   L = Σ δδᵀ,   R = mean of āāᵀ,   (G + λI)⁻¹ = (L ⊗ R + λI)⁻¹ exactly for these L and R

    f is the loss as the closure returns it, a mean or a sum. By kind of layer:

    - linear, also on sequences, convolutions in 1 to 3 dimensions: as above, a block for each group of channels. At a
      layer with several places a sample, `sharing="expand"` takes every place for a sample, `"reduce"` the mean of ā
      and the sum of δ over the places;
    - embedding: R = Σ δδᵀ, and L is diagonal, the frequencies of the tokens;
    - scale and shift of Layer-, RMS-, Batch- and GroupNorm: Σ gₙgₙᵀ over the derivatives gₙ of ⟨u, z⟩ by samples, a
      full block without bias where samples are independent;
    - weights used several times: the L ⊗ R that has the partial traces of the sum over the uses; weight and bias have
      blocks of their own where they are not always used together;
    - any other parameter: the diagonal of G, from the square of the derivative of ⟨u, z⟩, without bias.

    A parameter that is frozen or not used has no block; M divides it by λ.

    Args:
        decay: weight of the past in the running averages, per step: of statistics k steps old decayᵏ. The first are
            averaged evenly.
        statistics_every: steps between statistics, each from a fresh u.
        inverses_every: steps between eigendecompositions of L and R, made also when the number of statistics has
            doubled since the last. λ may change at no cost.
        sharing: see above.
        share: of the eigenpairs of factors larger than 128 that are kept, at least 32; the others are replaced by
            their mean. With 1 all are kept.
        max_samples: samples that enter R of a layer with one place a sample, spread evenly; on several processes, of
            each.
        max_places: places that enter R of a layer with several, spread evenly over samples and positions: bounds time
            and memory.
        max_size: factors larger than this are kept as their diagonals.
        seed: of u.

    Cost: statistics, a backward pass without the parameters' share, a third of a gradient, and K² multiplications for
    each of at most `max_samples` samples or `max_places` places and O² for each place of a layer with K inputs and O
    outputs; see `KroneckerInverse` for products and `Eigenpairs` for eigendecompositions. Memory: O² + K² a layer.

    Errors: `ValueError` for arguments; `RecordError` where the loss has no split. Statistics that are not finite are
    left out.

    Source: Martens and Grosse, arXiv 1503.05671; convolutions: Grosse and Martens, arXiv 1602.01073; expand and reduce:
    Eschenhagen et al., arXiv 2311.00636; exact damping in the eigenbasis: George et al., arXiv 1806.03884; leading
    eigenpairs: Puiu, arXiv 2206.15397. Deviations: u in the place of sampled labels, with the same covariance; no
    factored damping; the mean of the eigenvalues that are left out, where the last takes zero.
    """

    def __init__(
        self,
        *,
        decay: float = 0.95,
        statistics_every: int = 10,
        inverses_every: int = 40,
        sharing: Sharing = "expand",
        share: float = 1 / 16,
        max_samples: int = 256,
        max_places: int = 4096,
        max_size: int = 8192,
        seed: int = 0,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"KFAC: decay={decay} must lie between 0 and 1.")
        if not 0 < share <= 1:
            raise ValueError(f"KFAC: share={share} must be more than 0 and at most 1.")
        if sharing not in ("expand", "reduce"):
            raise ValueError(f'KFAC: sharing={sharing!r} must be "expand" or "reduce".')
        counts = {"statistics_every": statistics_every, "inverses_every": inverses_every}
        for name, value in {
            **counts,
            "max_samples": max_samples,
            "max_places": max_places,
            "max_size": max_size,
        }.items():
            if value < 1:
                raise ValueError(f"KFAC: {name}={value} must be at least 1.")
        self.decay = decay
        self.statistics_every = statistics_every
        self.inverses_every = inverses_every
        self.share = share
        self._statistics = Statistics(sharing, max_samples, max_places, max_size)
        self._generator = torch.Generator().manual_seed(seed)
        self._params: list[Tensor] = []
        self._blocks: dict[Positions, Block] = {}
        self._counts: dict[Positions, int] = {}
        self._spectra: dict[Positions, tuple[Eigenpairs, Eigenpairs]] = {}
        self._num_steps = 0
        self._num_statistics = 0
        self._inverse: KroneckerInverse | None = None  # of these spectra
        self._spectra_at = (0, 0)  # steps and statistics when they were taken

    @property
    def is_due(self) -> bool:
        """Whether the next step takes statistics."""
        return self._num_steps % self.statistics_every == 0

    def skip(self) -> None:
        """Count a step without a tape, when no statistics are due."""
        self._num_steps += 1

    def update(self, tape: Tape, shared: Shared | None = None) -> float:
        """Count a step, and take statistics from its tape if they are due; for `shared` see `Shared`.

        Returns the passes through the network that took, in gradients: ⅓ or 0.
        """
        self._params = tape.params
        due = self.is_due
        if due:
            fresh = self._statistics.blocks(tape, self._generator, shared)
            if shared is not None:
                fresh = joined(fresh, tape.params, shared)
            if all(block.is_finite() for block in fresh):
                self._average(fresh)
                self._num_statistics += 1
        self._num_steps += 1
        return 1 / 3 if due else 0.0

    def _average(self, fresh: list[Block]) -> None:
        kept = self.decay**self.statistics_every
        for block in fresh:
            key = block.positions
            old = self._blocks.get(key)
            if old is None or old.left.shape != block.left.shape or old.right.shape != block.right.shape:
                self._forget(key)
            count = self._counts[key] = self._counts.get(key, 0) + 1
            if count > 1:
                old, weight = self._blocks[key], max(1 / count, 1 - kept)
                left, right = old.left.lerp(block.left, weight), old.right.lerp(block.right, weight)
                block = Block(key, left, right)
            self._blocks[key] = block

    def _forget(self, positions: Positions) -> None:
        """Drop the blocks of these parameters: the closure uses them in another way now."""
        for key in [key for key in self._blocks if set(key) & set(positions)]:
            del self._blocks[key], self._counts[key]
            self._spectra.pop(key, None)
            self._inverse = None

    @property
    def approximation(self) -> KroneckerBlocks:
        """G as far as it is known, undamped."""
        return KroneckerBlocks(self._known_params(), list(self._blocks.values()))

    def inverse(self, damping: float) -> KroneckerInverse:
        """(G + λI)⁻¹ for λ = `damping`, with eigenpairs at most `inverses_every` steps old; later updates leave it."""
        if not 0 < damping < float("inf"):
            raise ValueError(f"KFAC.inverse: damping={damping} must be positive and finite.")
        params = self._known_params()
        num_steps, num_statistics = self._spectra_at
        doubled = self._num_statistics >= 2 * num_statistics
        if doubled or self._num_steps - num_steps >= self.inverses_every or self._blocks.keys() - self._spectra.keys():
            self._spectra = {
                key: (Eigenpairs.of(block.left, self.share), Eigenpairs.of(block.right, self.share))
                for key, block in self._blocks.items()
            }
            self._spectra_at = (self._num_steps, self._num_statistics)
            self._inverse = None
        if self._inverse is None or self._inverse.damping != damping or not _are_same(self._inverse.domain, params):
            self._inverse = KroneckerInverse(params, list(self._blocks.values()), self._spectra, damping)
        return self._inverse

    def _known_params(self) -> list[Tensor]:
        if not self._params:
            raise ValueError("KFAC: nothing is known of the parameters yet; call update(tape) first.")
        return self._params

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as tensors and numbers: continues bit for bit after `load_state_dict`."""
        return {
            "num_steps": self._num_steps,
            "num_statistics": self._num_statistics,
            "spectra_at": self._spectra_at,
            "generator": self._generator.get_state(),
            "blocks": [(b.positions, b.left, b.right, self._counts[key]) for key, b in self._blocks.items()],
            "spectra": [(key, *((s.values, s.basis, s.tail) for s in pair)) for key, pair in self._spectra.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`; the arguments of the constructor are not part of it."""
        self._num_steps, self._num_statistics = state["num_steps"], state["num_statistics"]
        steps, statistics = state["spectra_at"]
        self._spectra_at = (steps, statistics)
        self._generator.set_state(state["generator"])
        self._blocks = {tuple(key): Block(tuple(key), left, right) for key, left, right, _ in state["blocks"]}
        self._counts = {tuple(key): count for key, _, _, count in state["blocks"]}
        self._inverse = None
        self._spectra = {tuple(key): (Eigenpairs(*left), Eigenpairs(*right)) for key, left, right in state["spectra"]}


def _are_same(x: Sequence[Tensor], y: Sequence[Tensor]) -> bool:
    return len(x) == len(y) and all(a is b for a, b in zip(x, y, strict=True))
