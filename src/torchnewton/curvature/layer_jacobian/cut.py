"""Where to keep the cotangents of a layer: at its output s, or at a smaller tensor t that s is only selected into."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchnewton.record.graph import Edge, grad, walk


class Users:
    """Who takes what in the graph behind some edges: the way forward, which autograd does not keep."""

    def __init__(self, starts: Iterable[Edge]) -> None:
        self.outputs = set(starts)
        self._takers: dict[Edge, list[Node]] = {}
        self._numbers: dict[Node, set[int]] = {}
        for node, number in walk(self.outputs):
            if node not in self._numbers:
                for behind, place in node.next_functions:
                    if behind is not None:
                        self._takers.setdefault((behind, place), []).append(node)
            self._numbers.setdefault(node, set()).add(number)

    def reaches_outputs(self, edge: Edge) -> bool:
        """Whether an output depends on the tensor at `edge`."""
        return edge in self.outputs or edge in self._takers

    def only_taker(self, edge: Edge) -> Edge | None:
        """The output of the one operation that takes the tensor at `edge` and nothing else that is differentiated."""
        takers = self._takers.get(edge, [])
        if len(takers) != 1 or edge in self.outputs:
            return None
        return (takers[0], 0) if self._is_unary(takers[0]) else None

    def _is_unary(self, node: Node) -> bool:
        return self._numbers[node] == {0} and sum(behind is not None for behind, _ in node.next_functions) == 1

    def uses(self, edge: Edge, calls: Container[Edge]) -> int:
        """The number of operations that take the tensor at `edge`, its views and transposes being looked through.

        The search ends at the outputs of `calls`.
        """
        total, stack = 0, [edge]
        while stack:
            here = stack.pop()
            total += here in self.outputs
            for node in self._takers.get(here, []):
                if self._is_unary(node) and (node, 0) not in calls:
                    stack.append((node, 0))
                else:
                    total += 1
        return total


@dataclass(frozen=True)
class Cut:
    """t = w ⊙ s[index], entry by entry of the whole batch; `index` None stands for t = s and w = 1."""

    edge: Edge
    shape: torch.Size
    index: Tensor | None = None
    weight: Tensor | None = None

    def select(self, s: Tensor) -> Tensor:
        """s[index]: J of the selection without its weight, which the cotangents have taken in."""
        return s if self.index is None else s.reshape(-1).index_select(0, self.index)

    def scatter(self, t: Tensor, shape: torch.Size) -> Tensor:
        """Its transpose."""
        if self.index is None:
            return t.view(shape)
        flat = torch.zeros(shape.numel(), dtype=t.dtype, device=t.device)
        return flat.index_add_(0, self.index, t.reshape(-1)).view(shape)


def find_cut(edge: Edge, shape: torch.Size, users: Users, sizes: Mapping[Edge, torch.Size], like: Tensor) -> Cut:
    """The smallest tensor t behind s, through operations with one input, of which each entry is that of one of s.

    ReLU and max-pooling are such: C cotangents of t take a quarter of the memory of those of s after pooling by 2.
    """
    found = smallest_behind(edge, shape, users, sizes)
    selection = None if found.edge == edge else _selection(edge, shape, found, like)
    return Cut(edge, shape) if selection is None else selection


def smallest_behind(edge: Edge, shape: torch.Size, users: Users, sizes: Mapping[Edge, torch.Size]) -> Cut:
    """The smallest t behind s, or s itself; whether t is a selection is not asked."""
    here: Edge | None = edge
    best = Cut(edge, shape)
    while here is not None:
        size = sizes.get(here)
        if size is not None and len(size) and size[0] == shape[0] and 2 * size.numel() <= best.shape.numel():
            best = Cut(here, size)
        here = users.only_taker(here)
    return best


def _selection(source: Edge, shape: torch.Size, cut: Cut, like: Tensor) -> Cut | None:
    """Index and weight of the map s → t, from its transpose; None where t is no selection of s."""
    n = shape[0]

    def transpose(u: Tensor) -> Tensor:
        (found,) = grad([cut.edge], [source], [u.view(cut.shape)])
        return torch.zeros(shape.numel(), dtype=like.dtype, device=like.device) if found is None else found.reshape(-1)

    size = cut.shape.numel() // n
    ones = torch.ones(cut.shape, dtype=like.dtype, device=like.device)
    numbers = torch.arange(1.0, size + 1, dtype=like.dtype, device=like.device).expand(n, -1)
    weights, places = transpose(ones), transpose(numbers.contiguous())
    (chosen,) = weights.nonzero(as_tuple=True)
    number = (places[chosen] / weights[chosen]).round().long() - 1
    if chosen.numel() and not (int(number.min()) >= 0 and int(number.max()) < size):
        return None
    target = chosen.div(shape.numel() // n, rounding_mode="floor") * size + number
    # entries of t that depend on nothing point to the first entry of their sample, with weight 0
    index = torch.arange(n, device=like.device).repeat_interleave(size) * (shape.numel() // n)
    index[target] = chosen
    weight = torch.zeros(n * size, dtype=like.dtype, device=like.device)
    weight[target] = weights[chosen]
    generator = torch.Generator(device=like.device).manual_seed(0)
    u = torch.randn(n * size, generator=generator, dtype=like.dtype, device=like.device)
    found = Cut(cut.edge, cut.shape, index, weight)
    expected = transpose(u)
    tolerance = 1000 * torch.finfo(like.dtype).eps
    close = (found.scatter(weight * u, shape).view(-1) - expected).norm() <= tolerance * expected.norm()
    return found if bool(close) else None
