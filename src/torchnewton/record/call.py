"""Calls of torch functions: their tensors, and those that use parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchnewton.record.flops import flops
from torchnewton.record.graph import Edge
from torchnewton.record.losses import Function


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a torch function that used parameters: its arguments as they were, and where its output stands.

    A matrix product with what was made of parameters alone, as by `weight_norm`, is one, too.

    `tensors` are the tensors among the arguments in their order, `parameters` the live parameters among them, `input`
    the first other one. `exact` is False where autocast has changed the numbers.
    """

    function: Function
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    edge: Edge
    output_shape: torch.Size
    exact: bool

    @property
    def input(self) -> Tensor | None:
        """The first tensor that is no parameter."""
        used = {id(p) for p in self.parameters}
        return next((t for t in self.tensors if id(t) not in used), None)

    @property
    def flops(self) -> float:
        """Operations of its matrix products; 0 for what is none, as a lookup in a table."""
        return flops(self.function, self.args, self.kwargs, self.output_shape)

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same call with other tensors in the place of `self.tensors`."""
        parts = iter(tensors)
        args = replaced(self.args, parts)
        kwargs = dict(zip(self.kwargs, replaced(self.kwargs.values(), parts), strict=True))
        output: Tensor = self.function(*args, **kwargs)
        return output


def replaced(values: Any, parts: Iterator[Tensor]) -> list[Any]:
    """The call arguments with their tensors taken from `parts` in the order of `tensors_in`."""
    new: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            new.append(next(parts))
        elif isinstance(value, (list, tuple)):
            new.append(type(value)(next(parts) if isinstance(item, Tensor) else item for item in value))
        else:
            new.append(value)
    return new


def tensors_in(values: Sequence[Any] | Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among call arguments, one level of lists and tuples deep."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))
