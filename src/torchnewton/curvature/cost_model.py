"""The cost model: floating-point operations of every way to use a Gauss-Newton matrix.

With N samples, M outputs a sample, P parameters, F operations of a forward pass, and for each layer T entries of a
sample at the cut, L places, K inputs and O outputs of a place (linear: L = 1), n = N·M:

| way | before the first product | each product |
|---|---|---|
| kept double backward | 0 | 4 F, with half of e |
| explicit layer factors | (M + 1)F + Σ r N M T | 2 F + Σ r N M T |
| dense matrix | rows + 2 n P² + e P² | |
| Gram matrix, linear | cotangents + n² O + e n² | |
| Gram matrix, convolution | cotangents + e n² + the less of 2 n L O K + n² O K and n² L² O + 2 N² L² K | |
| rows by replay | (2 + 4 M) F | |

A gradient is 3 F. The unit is an operation of a matrix product. What is no matrix product counts as the operations
that take as long: r = `READ` for a number of the factors; e = `PASS` for an entry of a layer's output in a forward pass
(part of F: activations, pooling, attention) and for an entry of a layer's share of the Gram matrix; `CALL` for every
call of a layer. They were fitted to times on one thread.
"""

from __future__ import annotations

import math

from torchnewton.costs import Costs
from torchnewton.curvature.groups import output_groups
from torchnewton.curvature.layer_jacobian import LayerJacobian
from torchnewton.curvature.layer_jacobian.layers import Layer, Paired
from torchnewton.record import Tape
from torchnewton.vectors import num_entries

CALL = 7e6  # operations that take as long as the overhead of one call
READ = 60.0  # operations that take as long as reading one number of the factors
PASS = 700.0  # operations that take as long as the elementwise work on one entry


def gauss_newton_costs(tape: Tape, explicit: LayerJacobian | None, num_products: int) -> Costs:
    """The costs of the cheaper Jacobian for that many products, and of the dense and the Gram matrix.

    `explicit` is None where the Jacobian is fixed to kept double backward.
    """
    passes_over = PASS * sum(call.output_shape.numel() for call in tape.layer_calls)
    forward, calls = tape.forward_flops + passes_over, CALL * len(tape.layer_calls)
    groups, size = output_groups(tape), num_entries(tape.params)
    rows = sum(group.num_samples * group.width for group in groups)
    width = max((group.width for group in groups), default=0)
    setup, passes = (2 + 4 * width) * (forward + calls), 2 + 4 * width
    gram, gram_reads = float(rows) ** 2 * size, 0.0
    products = Costs(product=4 * (tape.forward_flops + calls) + 2 * passes_over)
    if explicit is not None:
        share = explicit.expected_coverage
        reads = READ * sum(explicit.entries_at_cut(layer) * width for layer in explicit.layers)
        factors = (width + 1) * (forward + calls) + reads
        product = 2 * (forward + calls) + reads + (1 - share) * products.product
        if factors + num_products * product < num_products * products.product:
            products = Costs(product, factors)
        if share == 1:
            setup, passes = factors, width + 1
            parts = [gram_flops(layer, width) for layer in explicit.layers]
            gram, gram_reads = sum(part[0] for part in parts), sum(part[1] for part in parts)
    overhead = setup - passes * tape.forward_flops
    square = float(size) ** 2
    return Costs(
        products.product,
        products.setup,
        setup + (2.0 * rows + PASS) * square,  # in float64
        setup + gram + gram_reads,
        rows,
        overhead + PASS * square,
        overhead + gram_reads,
    )


def gram_flops(layer: Layer, width: int) -> tuple[float, float]:
    """Operations of a layer's share of RRᵀ with `width` rows a sample, and those that stand for passes over memory."""
    rows = layer.num_samples * width
    reads = PASS * float(rows) ** 2
    if not isinstance(layer, Paired):
        return float(rows) ** 2 * layer.num_parameters, reads + READ * rows * layer.num_parameters
    return min(gram_by_pairs(layer, width), gram_by_rows(layer, width)), reads


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
