"""What a full plane step must cost: its operations by the shapes of the layers, and its traffic in whole vectors."""

from __future__ import annotations

import torch

import torchnewton as tn
from benchmarks.timing import measure
from torchnewton.curvature import KFAC
from torchnewton.curvature.kfac.blocks import Block
from torchnewton.curvature.layer_jacobian.layers import Paired
from torchnewton.vectors import dot

SYMMETRIC = 9 / 16  # of a matrix product of which one half is known
PASSES = {  # reads and writes of vectors like the parameters
    "−∇f": 2,
    "product with the Kronecker inverses": 2,
    "two trial points: parameters kept aside, moved, put back": 2 * 7,
    "lengths of the two directions": 2,
    "slopes along them": 4,
    "their Gram matrix": 6,
    "the step, a combination of them": 5,
    "update of the parameters": 3,
}


def count(tape: tn.Tape, kfac: KFAC, damping: float) -> dict[str, float]:
    """`operations` of a step without its vectors, in those of a gradient, and `seconds` of these vectors.

    Two forward passes belong to the plane. Without a derivative in its input, the first layer takes no part in
    propagating back: a gradient is less than three forward passes, so that each of them is more than a third.
    """
    layers = [layer for layer in tn.LayerJacobian(tape).layers if isinstance(layer, Paired)]
    flops = sum(layer.forward_flops for layer in layers)
    back = flops - sum(layer.forward_flops for layer in layers if not layer.arguments["input"].requires_grad)
    blocks = kfac.approximation.kronecker_blocks
    places = {layer.weight_position: layer.places * len(tape.outputs[0]) for layer in layers}
    statistics = back + sum(_moments(block, places[block.positions[0]]) for block in blocks)
    inverses = sum(_eigenpairs(values, basis) for _, *pair in kfac.state_dict()["spectra"] for values, basis, _ in pair)
    step = 2 * flops + kfac.inverse(damping).costs(1).product
    step += statistics / kfac.statistics_every + inverses / kfac.inverses_every
    return {"operations": 1 + step / (2 * flops + back), "seconds": sum(PASSES.values()) * pass_seconds(tape)}


def pass_seconds(tape: tn.Tape) -> float:
    """CPU seconds to read one vector like the parameters: half an inner product."""
    x, y = ([torch.randn_like(p) for p in tape.params] for _ in range(2))
    return measure({"dot": lambda: dot(x, y)})["dot"] / 2


def _moments(block: Block, places: int) -> float:
    """Those of Σ δδᵀ and of the mean of āāᵀ over at most 4096 places."""
    left, right = (2 * SYMMETRIC * factor.shape[0] * factor.shape[1] ** 2 for factor in (block.left, block.right))
    return places * left + min(places, 4096) * right


def _eigenpairs(values: torch.Tensor, basis: torch.Tensor | None) -> float:
    """3n²k multiplications for k of n eigenpairs, 9n³ for all, as `Eigenpairs` states."""
    if basis is None:
        return 0.0
    groups, n, k = basis.shape
    return groups * 2.0 * (9 * n**3 if k == n else 3 * n**2 * k)
