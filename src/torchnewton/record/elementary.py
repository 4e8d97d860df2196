"""Losses written by hand: sums of elementary functions that are convex, as of squares or of log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from torchnewton.record.graph import kind_of, reaches
from torchnewton.record.losses import (
    ACTIVATIONS,
    LINEAR_NODES,
    Activations,
    Function,
    activation_behind,
)

_POWERS: set[Function] = {torch.pow, Tensor.pow, Tensor.__pow__, torch.float_power, Tensor.float_power}
_SQUARES: set[Function] = {torch.square, Tensor.square}
_PRODUCTS: set[Function] = {
    torch.mul,
    Tensor.mul,
    torch.dot,
    Tensor.dot,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.inner,
}
_LOGS = {getattr(owner, name) for owner in (torch, Tensor) for name in ("log", "log1p", "log2", "log10")}
_CONVEX: set[Function] = {
    getattr(owner, name) for owner in (torch, Tensor) for name in ("exp", "expm1", "cosh", "logsumexp")
}
_CONCAVE = {torch.log_softmax, Tensor.log_softmax, F.log_softmax, F.logsigmoid, *_LOGS}
_COMPLEMENTS = {torch.rsub, Tensor.__rsub__}
NORMS: frozenset[Function] = frozenset({torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm})

ELEMENTARY: frozenset[Function] = frozenset(
    {*_POWERS, *_SQUARES, *_PRODUCTS, *_CONVEX, *_CONCAVE, *NORMS, F.softplus, torch.exp2}
)

# between a loss and what it is a sum of: the second where such a function is no piece itself
_CURVED = frozenset({"Pow", "Sqrt", "Exp", "Log", "Log1P", "Log2", "Log10", "Expm1"})
_OF_TWO = frozenset({"Mul", "Div", "Dot"})


@dataclass(frozen=True)
class Elementary:
    """One call φ(z) whose sign · φ is convex in z.

    `is_norm` says that φ = ‖z‖, whose second derivative is 0 along z, where all of its slope is: see `Piece`.
    """

    z: Tensor
    sign: float
    num_samples: Callable[[], float] | None = None
    is_norm: bool = False

    @classmethod
    def of(
        cls, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor, activations: Activations
    ) -> Elementary | None:
        """The call as one; None where it is none, and where z is no tensor with a graph."""
        z = args[0] if args else kwargs.get("input")
        if func not in ELEMENTARY or not isinstance(z, Tensor) or not z.requires_grad or z.is_complex():
            return None
        if func in NORMS:
            return cls(z, 1.0, is_norm=True) if _is_euclidean(func, args, kwargs) else None
        if func in _POWERS or func in _SQUARES or func in _PRODUCTS:
            if not _is_square(func, args, kwargs):
                return None
            behind = activations.get(z.grad_fn) if z.grad_fn is not None else None
            return cls(behind[1] if behind is not None and behind[0] in NORMS else z, 1.0)
        if func in _LOGS and "1p" not in func.__name__:
            source = activation_behind(z, ACTIVATIONS, activations, logs=1)
            return cls(z if source is None else source, -1.0)
        if func in _CONCAVE:
            over_classes = func is not F.logsigmoid
            return cls(z, -1.0, partial(_num_distributions, output) if over_classes else None)
        return cls(z, 1.0)


def is_complement(func: Function, args: Sequence[Any]) -> bool:
    """Whether a call is 1 − p: where p = σ(z), it is σ(−z)."""
    return func in _COMPLEMENTS and len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 1


def is_passed(node: Node, params: Sequence[Tensor], products: bool) -> bool:
    """Whether a loss may be a sum of what is behind `node`; of products of two that depend on `params`, if asked."""
    return kind_of(node) in _CURVED or is_linear(node, params, products)


def is_linear(node: Node, params: Sequence[Tensor], products: bool = False) -> bool:
    """Whether a node is a linear function of what depends on `params`, or a product of two such, if asked."""
    kind = kind_of(node)
    if kind not in LINEAR_NODES:
        return False
    parents = [(parent, number) for parent, number in node.next_functions if parent is not None]
    if products or kind not in _OF_TWO or len(parents) < 2:
        return True
    return sum(reaches([edge], params, ()) for edge in parents) < 2


def is_curved(node: Node) -> bool:
    """Whether a node is a function or product that has curvature where it is part of a loss."""
    return kind_of(node) in _CURVED | _OF_TWO


def _is_square(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call is z², another even power, or the sum of squares zᵀz."""
    if func in _SQUARES:
        return True
    other = args[1] if len(args) > 1 else kwargs.get("exponent", kwargs.get("other"))
    if func in _PRODUCTS:
        elementwise = func in (torch.mul, Tensor.mul)
        return other is args[0] and (elementwise or args[0].dim() == 1)
    return isinstance(other, (int, float)) and other >= 2 and other % 2 == 0


def _is_euclidean(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a norm is the root of a sum of squares; of a matrix the order 2 is another one."""
    order = args[1] if len(args) > 1 else kwargs.get("ord", kwargs.get("p"))
    if func is torch.linalg.norm and order == 2:
        dim = args[2] if len(args) > 2 else kwargs.get("dim")
        return args[0].dim() == 1 or isinstance(dim, int)
    return order in (None, "fro", 2)


def _num_distributions(log_probabilities: Tensor) -> float:
    return float(log_probabilities.detach().double().exp().sum())  # a 1 for each
