"""Calls that Jᵀu takes at values which are known: a derivative in u costs their transpose, nothing more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node

Gradients = tuple[Tensor | None, ...]


class KnownCall(ABC):
    """One call of a layer, with the node that takes its gradient: (∂⟨y, g⟩/∂x, ∂⟨y, g⟩/∂w, ∂⟨y, g⟩/∂b)."""

    node: Node

    @abstractmethod
    def adjoint(self, above: Tensor, found: Gradients) -> Gradients:
        """The gradients `found` by the node, with a graph to g = `above` alone."""

    def gradient(self, found: Gradients, above: Gradients) -> Gradients | None:
        """The hook of the node."""
        if above[0] is None or not above[0].requires_grad:
            return None
        return self.adjoint(above[0], tuple(None if g is None else g.detach() for g in found))


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel has seen these tensors as they are: no subclass, no cast, no transform."""
    used = [t for t in tensors if t is not None]
    return all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.dtype == used[0].dtype
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in used
    )


@contextmanager
def at_known_values(calls: Sequence[KnownCall]) -> Iterator[None]:
    """Let a backward pass with `create_graph` take these calls as functions of the gradient that comes in alone.

    Their second derivatives in x and w, which a Jacobian has no use for, are what most of the time would go to:
    autograd computes them whether they are asked for or not.
    """
    hooks = [call.node.register_hook(call.gradient) for call in calls]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
