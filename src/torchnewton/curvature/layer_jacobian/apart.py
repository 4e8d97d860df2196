"""Where the graph alone tells that samples are apart."""

from __future__ import annotations

from collections.abc import Iterable

from torch.autograd.graph import Node

from torchnewton.record.graph import Edge

_BY_ENTRY = {
    f"{name}Backward0"
    for name in ("Relu", "Tanh", "Sigmoid", "Gelu", "Silu", "Elu", "LeakyRelu", "Softplus", "Hardtanh", "Mish")
}
_PRODUCTS = {"AddmmBackward0", "MmBackward0"}


def rows_stay_apart(outputs: Iterable[Edge]) -> bool:
    """Whether the graph behind `outputs` is sure to take each of their rows from the same row of all tensors in it.

    Sure are linear layers on matrices, with leaves for weight and bias, and functions of single entries, down to inputs
    without derivative. False for everything else, which is to say that it is not known.
    """
    stack = [node for node, _ in outputs]
    seen = set(stack)
    while stack:
        behind = _rows_from(stack.pop())
        if behind is None:
            return False
        stack += [node for node in behind if node not in seen]
        seen.update(behind)
    return True


def _rows_from(node: Node) -> list[Node] | None:
    """What a node takes its rows from; None where it is not sure to keep them apart."""
    name, takes = node.name(), [behind for behind, _ in node.next_functions]
    if name in _BY_ENTRY:
        return [behind for behind in takes if behind is not None]
    if name not in _PRODUCTS:
        return None
    *bias, x, weight = takes
    if weight is not None and weight.name() == "TBackward0":
        weight = weight.next_functions[0][0]
    if not all(_is_leaf(behind) for behind in (*bias, weight)):
        return None
    return [] if x is None else [x]


def _is_leaf(node: Node | None) -> bool:
    return node is None or node.name() == "torch::autograd::AccumulateGrad"
