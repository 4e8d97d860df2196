"""Questions about autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torchnewton.record.errors import RecordError

Edge = tuple[Node, int]

_NO_SECOND_DERIVATIVE = (
    "derivative for",
    "double backward",
    "does not support",
    "not implemented",
    "once_differentiable",
)


def edge_of(tensor: Tensor) -> Edge:
    """Where `tensor` stands in the graph now; an operation in place moves the tensor on, the edge stays."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def kind_of(node: Node) -> str:
    """The operation of a node: "Mul" for MulBackward0."""
    return node.name().rstrip("0123456789").removesuffix("Backward")


def walk(
    starts: Iterable[Edge], stop: Container[Edge] = (), passed: Callable[[Node], bool] | None = None
) -> Iterator[Edge]:
    """Every edge of the graph behind `starts` with them, not going behind those in `stop`, nor nodes not `passed`."""
    stack = list(starts)
    seen = set(stack)
    while stack:
        current = stack.pop()
        yield current
        if current in stop or (passed is not None and not passed(current[0])):
            continue
        for node, number in current[0].next_functions:
            if node is not None and (node, number) not in seen:
                seen.add((node, number))
                stack.append((node, number))


def reaches(starts: Iterable[Edge], params: Sequence[Tensor], stop: Container[Edge]) -> bool:
    """Whether a parameter lies behind `starts` on a way that does not pass `stop`."""
    leaves = {id(p) for p in params}
    edges = walk(starts, stop)
    return any(edge not in stop and id(getattr(edge[0], "variable", None)) in leaves for edge in edges)


def grad(
    of: Sequence[Edge], wrt: Sequence[Edge | Tensor], weights: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """`torch.autograd.grad` that keeps the graph and gives None for what does not depend."""
    places = [t for t in wrt if not isinstance(t, Tensor) or t.requires_grad]
    if not of or not places:
        return [None] * len(wrt)
    with explained_errors():
        found = iter(
            torch.autograd.grad(
                [GradientEdge(*edge) for edge in of],
                [get_gradient_edge(t) if isinstance(t, Tensor) else GradientEdge(*t) for t in places],
                weights,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [None if isinstance(t, Tensor) and not t.requires_grad else next(found) for t in wrt]


def filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in the place of None."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, like, strict=True)]


def inspected(loss: Edge) -> tuple[bool, list[nn.Parameter]]:
    """Whether custom functions are in the graph, and its parameters; raises for reentrant checkpoints, which hide some.

    Other leaves, as the points of a physics-informed loss, are left out: to differentiate by them costs as much again.
    """
    custom, parameters = False, []
    for node, _ in walk([loss]):
        if isinstance(leaf := getattr(node, "variable", None), nn.Parameter):
            parameters.append(leaf)
        if node.name() == "CheckpointFunctionBackward":
            raise RecordError(
                "reentrant checkpointing hides parameters from a second derivative: call "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        custom = custom or isinstance(node, torch.autograd.function.BackwardCFunction)
    return custom, parameters


def refuse_once_differentiable(tensors: Iterable[Tensor]) -> None:
    """Raise for custom functions whose backward pass has no derivative: products would be silently zero."""
    starts = [edge_of(t) for t in tensors if t.requires_grad]
    if any(node.name() == "torch::autograd::Error" for node, _ in walk(starts)):
        raise RecordError(
            "a torch.autograd.Function of the closure is once_differentiable, so it cannot be differentiated twice and "
            "has no curvature products: write its backward with differentiable operations."
        )


@contextmanager
def explained_errors() -> Iterator[None]:
    """Turn autograd's errors about what it cannot differentiate into the way out."""
    try:
        yield
    except RecordError:
        raise
    except RuntimeError as error:
        message = str(error)
        if "backward through the graph a second time" in message:
            raise RecordError(
                "part of the closure's graph was freed, by a backward pass outside of the recording or by a tensor "
                "kept from an earlier step: compute the loss anew in each call and detach what is carried over."
            ) from error
        if any(phrase in message for phrase in _NO_SECOND_DERIVATIVE):
            raise RecordError(
                f"an operation of the closure cannot be differentiated twice: {message.splitlines()[0]} "
                "Replace it by a differentiable one, or keep its parameters out of the optimizer."
            ) from error
        raise
