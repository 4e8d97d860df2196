"""The cost model: floating-point operations of every way to use a Gauss-Newton matrix.

With N samples, M outputs a sample, P parameters, F operations of a forward pass, and for each layer T entries of a
sample at the cut, L places, K inputs and O outputs of a place (linear: L = 1), n = N·M:

| way | before the first product | each product |
|---|---|---|
| kept double backward | 0 | 4 F |
| explicit layer factors | (M + 1)(F + Σ w N T) | 2 F + Σ w N M T |
| dense matrix | rows + n P² | |
| Gram matrix, linear | cotangents + n² O | |
| Gram matrix, convolution | cotangents + the less of 2 n L O K + n² O K and n² L² O + 2 N² L² K | |
| rows by replay | (2 + 4 M) F | |

A gradient is 3 F. w = 40 operations is what reading one number of the factors costs, since these are passes over memory
and no matrix products; every call of a layer counts `CALL` operations besides.
"""

from __future__ import annotations

import math

from torchnewton.costs import Costs
from torchnewton.curvature.groups import output_groups
from torchnewton.curvature.layer_jacobian import LayerJacobian
from torchnewton.curvature.layer_jacobian.layers import Layer, Paired
from torchnewton.record import Tape
from torchnewton.vectors import num_entries

CALL = 2e6  # operations that take as long as the overhead of one call
READ = 40.0  # operations that take as long as reading one number of the factors


def gauss_newton_costs(tape: Tape, explicit: LayerJacobian | None, num_products: int) -> Costs:
    """The costs of the cheaper Jacobian for that many products, and of the dense and the Gram matrix.

    `explicit` is None where the Jacobian is fixed to kept double backward.
    """
    forward, calls = forward_flops(tape), CALL * len(tape.layer_calls)
    groups, size = output_groups(tape), num_entries(tape.params)
    rows = sum(group.num_samples * group.width for group in groups)
    width = max((group.width for group in groups), default=0)
    replay = (2 + 4 * width) * (forward + calls)
    products = Costs(product=4 * (forward + calls))
    setup, gram = replay, replay + float(rows) ** 2 * size
    if explicit is not None:
        share = explicit.expected_coverage
        reads = READ * sum(layer.output_shape.numel() * width for layer in explicit.layers)
        setup = (width + 1) * (forward + calls) + reads
        product = 2 * (forward + calls) + reads + (1 - share) * products.product
        if setup + num_products * product < num_products * products.product:
            products = Costs(product, setup)
        if share == 1:
            gram = setup + sum(gram_flops(layer, width) for layer in explicit.layers)
        else:
            setup = replay
    return Costs(products.product, products.setup, setup + float(rows) * size**2, gram, rows)


def gram_flops(layer: Layer, width: int) -> float:
    """Operations of a layer's share of RRᵀ with `width` rows a sample."""
    rows = layer.num_samples * width
    reads = READ * rows**2 / 4
    if not isinstance(layer, Paired):
        return float(rows) ** 2 * layer.num_parameters + reads + READ * rows * layer.num_parameters
    return min(gram_by_pairs(layer, width), gram_by_rows(layer, width)) + reads


def gram_by_pairs(layer: Paired, width: int) -> float:
    """(N r L)²·(O + 8) + (N L)²·K multiplications and additions, half of them by symmetry; 8 for passes over memory."""
    if layer.groups > 1:
        return math.inf
    places = layer.num_samples * layer.places
    outputs = layer.output_shape.numel() / places
    passes = READ if layer.places > 1 else 0.0
    return (places * width) ** 2 * (outputs + passes) + places**2 * float(layer.fan_in)


def gram_by_rows(layer: Paired, width: int) -> float:
    """2 N r L O K for the rows and (N r)²·O K for their products."""
    outputs = layer.output_shape.numel() / (layer.num_samples * layer.places)
    rows = layer.num_samples * width
    return (2.0 * rows * layer.places + float(rows) ** 2) * outputs * layer.fan_in


def forward_flops(tape: Tape) -> float:
    """Operations of a forward pass: 2 · output entries · fan-in for each call of a layer with a weight."""
    total = 0.0
    for call in tape.layer_calls:
        for p in call.parameters:
            if p.dim() >= 2:
                total += 2.0 * call.output_shape.numel() * (p.numel() // max(p.shape[0], 1))
    return total
