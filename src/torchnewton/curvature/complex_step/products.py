"""Products and quotients: xy is continued by the product rule, a convolution as three real ones.

PyTorch's own complex convolution computes the imaginary part as a difference of large products (three multiplications
instead of four); with an imaginary part of 1e-20 nothing is left of it. Here no imaginary part ever meets a real one in
a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.complex_step.pair import (
    IN_PLACE_RULES,
    PYTHON_RULES,
    ComplexPair,
    as_pair,
    im,
    is_pair,
    keeps_squares,
    re,
    rule,
)
from torchnewton.record import RecordError

Real = Callable[..., Any]


def multilinear(f: Real, *factors: Any) -> Any:
    """f continued, where f is linear in each factor: Σᵢ f(x₁, …, yᵢ, …); with squares, minus each pair of them."""
    real = [re(a) for a in factors]
    moving = [i for i, a in enumerate(factors) if is_pair(a)]
    if not moving:
        return f(*real)

    def with_imaginary(*chosen: int) -> Any:
        return f(*(factors[i].im if i in chosen else a for i, a in enumerate(real)))

    value = f(*real)
    if keeps_squares():
        for two in combinations(moving, 2):
            value = value - with_imaginary(*two)
    return ComplexPair(value, reduce(torch.add, (with_imaginary(i) for i in moving)))


def _multilinear(name: str, count: int = 2) -> None:
    f = _function(name)

    def product(*args: Any, **kwargs: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        values = [*args, *kwargs.values()]
        rest, names = values[count:], list(kwargs)[max(0, count - len(args)) :]
        positional = rest[: len(rest) - len(names)]
        named = dict(zip(names, rest[len(positional) :], strict=True))
        return multilinear(lambda *factors: f(*factors, *positional, **named), *values[:count])

    rule(name)(product)


def _function(name: str) -> Real:
    found: Real = getattr(torch, name, None) or getattr(torch.linalg, name)
    return found


for _name in ("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "kron", "cross", "vecdot"):
    _multilinear(_name)


@rule("mul", "multiply")
def mul(input: Any, other: Any) -> ComplexPair:
    """(x₁x₂, x₁y₂ + y₁x₂)."""
    a, b = re(input), re(other)
    value = a * b
    if not is_pair(other):
        return ComplexPair(value, input.im * b)
    if not is_pair(input):
        return ComplexPair(value, a * other.im)
    if keeps_squares():
        value = value - input.im * other.im
    return ComplexPair(value, a * other.im + input.im * b)


@rule("square")
def square(input: ComplexPair) -> ComplexPair:
    """(x², 2xy)."""
    value = input.re.square()
    if keeps_squares():
        value = value - input.im.square()
    return ComplexPair(value, 2 * input.re * input.im)


@rule("div", "divide", "true_divide")
def div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    """With q = x₁/x₂: (q, (y₁ − q y₂)/x₂); nothing is divided by a modulus."""
    a, b = re(input), re(other)
    if rounding_mode is not None:
        return torch.div(a, b, rounding_mode=rounding_mode)
    if not is_pair(other):
        return ComplexPair(a / b, input.im / b)
    if keeps_squares():
        return mul(input, reciprocal(other))
    q = a / b
    return ComplexPair(q, (im(input) - q * other.im) / b)


@rule("reciprocal")
def reciprocal(input: ComplexPair) -> ComplexPair:
    """1/z."""
    if keeps_squares():
        size = input.re.square() + input.im.square()
        return ComplexPair(input.re / size, -input.im / size)
    q = input.re.reciprocal()
    return ComplexPair(q, -q * q * input.im)


@rule("add")
def add(input: Any, other: Any, *, alpha: float = 1) -> ComplexPair:
    """z₁ + αz₂."""
    a, b = re(input), re(other)
    value = a + b if alpha == 1 else torch.add(a, b, alpha=alpha)
    if not is_pair(other):
        return ComplexPair(value, input.im)
    if not is_pair(input):
        return ComplexPair(value, other.im if alpha == 1 else alpha * other.im)
    return ComplexPair(value, input.im + other.im if alpha == 1 else torch.add(input.im, other.im, alpha=alpha))


@rule("sub", "subtract")
def sub(input: Any, other: Any, *, alpha: float = 1) -> ComplexPair:
    """z₁ − αz₂."""
    return add(input, other, alpha=-alpha)


def _add_in_place(input: Any, other: Any, *, alpha: float = 1) -> ComplexPair:
    """The imaginary part is not touched by a real summand: what was computed from it stays valid."""
    pair = input if is_pair(input) else as_pair(input)
    pair.re.add_(re(other), alpha=alpha)
    if is_pair(other):
        pair.im.add_(other.im, alpha=alpha)
    return pair


def _sub_in_place(input: Any, other: Any, *, alpha: float = 1) -> ComplexPair:
    return _add_in_place(input, other, alpha=-alpha)


IN_PLACE_RULES.update({"add_": _add_in_place, "sub_": _sub_in_place, "subtract_": _sub_in_place})


@rule("rsub")
def rsub(input: Any, other: Any, *, alpha: float = 1) -> ComplexPair:
    """z₂ − αz₁."""
    return add(other, input, alpha=-alpha)


def _without_multiples(value: Tensor, input: Any, other: Any) -> ComplexPair:
    """z₁ − n z₂ with the whole number n that gives the real part `value`."""
    return ComplexPair(value, im(input) - ((re(input) - value) / re(other)).detach() * im(other))


@rule("remainder")
def remainder(input: Any, other: Any) -> ComplexPair:
    """z₁ − n z₂, with the sign of z₂."""
    return _without_multiples(torch.remainder(re(input), re(other)), input, other)


@rule("fmod")
def fmod(input: Any, other: Any) -> ComplexPair:
    """z₁ − n z₂, with the sign of z₁."""
    return _without_multiples(torch.fmod(re(input), re(other)), input, other)


@rule("lerp")
def lerp(input: Any, end: Any, weight: Any) -> Any:
    """z₁ + w(z₂ − z₁)."""
    return input + weight * (end - input)


@rule("addmm", "addmv", "addr", "addbmm", "baddbmm")
def addmm(input: Any, first: Any = None, second: Any = None, *, beta: float = 1, alpha: float = 1, **named: Any) -> Any:
    """βz + α · product, told apart by the shapes."""
    first, second = (named.get(n, x) for n, x in (("mat1", first), ("mat2", second)))
    first, second = (named.get(n, x) for n, x in (("batch1", first), ("batch2", second)))
    product = torch.outer(first, second) if first.dim() == second.dim() == 1 else first @ second
    if product.dim() > input.dim() and first.dim() == 3:
        product = product.sum(0) if input.dim() < 3 else product
    return (input if beta == 1 else beta * input) + (product if alpha == 1 else alpha * product)


@rule("addcmul")
def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    """z + v · z₁z₂."""
    return input + value * (tensor1 * tensor2)


@rule("addcdiv")
def addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    """z + v · z₁/z₂."""
    return input + value * (tensor1 / tensor2)


@rule("einsum")
def einsum(equation: str, *operands: Any) -> Any:
    """Linear in each operand."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    return multilinear(lambda *factors: torch.einsum(equation, *factors), *operands)


@rule("tensordot")
def tensordot(a: Any, b: Any, dims_self: Sequence[int], dims_other: Sequence[int]) -> Any:
    """Linear in each factor."""
    return multilinear(lambda x, y: torch.tensordot(x, y, dims=(list(dims_self), list(dims_other))), a, b)


@rule("chain_matmul", "multi_dot")
def multi_dot(*matrices: Any) -> Any:
    """A product of matrices, from the left."""
    if len(matrices) == 1:
        matrices = tuple(matrices[0])
    return reduce(torch.matmul, matrices)


PYTHON_RULES[torch.chain_matmul] = multi_dot


# --- layers ----------------------------------------------------------------------------------------------------------


def affine(f: Real, input: Any, weight: Any, bias: Any) -> ComplexPair:
    """f(input, weight, bias), linear in the first two, plus the bias: three real calls where both are complex."""
    x, w, b = re(input), re(weight), re(bias)
    y = None if bias is None or not is_pair(bias) else bias.im
    value = f(x, w, b)
    if is_pair(input):
        imaginary = f(input.im, w, y)
        if is_pair(weight):
            imaginary = imaginary + f(x, weight.im, None)
            if keeps_squares():
                value = value - f(input.im, weight.im, None)
    elif is_pair(weight):
        imaginary = f(x, weight.im, y)
    else:
        imaginary = f(torch.zeros_like(x), w, y)
    return ComplexPair(value, imaginary)


@rule("linear")
def linear(input: Any, weight: Any, bias: Any = None) -> ComplexPair:
    """zWᵀ + b."""
    return affine(F.linear, input, weight, bias)


@rule("bilinear")
def bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    """z₁ᵀAz₂ + b."""
    product = multilinear(lambda x, y, w: F.bilinear(x, y, w), input1, input2, weight)
    return product if bias is None else product + bias


def _convolution(name: str) -> None:
    f = getattr(torch, name)

    def convolution(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> ComplexPair:
        return affine(lambda x, w, b: f(x, w, b, *args, **kwargs), input, weight, bias)

    rule(name)(convolution)


for _name in (
    *(f"conv{d}d" for d in (1, 2, 3)),
    *(f"conv_transpose{d}d" for d in (1, 2, 3)),
    "convolution",
):
    _convolution(_name)


@rule("embedding")
def embedding(weight: ComplexPair, indices: Tensor, padding_idx: int = -1, *args: Any) -> ComplexPair:
    """Rows of a table. The row of `padding_idx` is a constant, as for autograd."""
    rows = torch.embedding(weight.im, indices, padding_idx, *args)
    if padding_idx >= 0:
        rows = rows.masked_fill((indices == padding_idx).unsqueeze(-1), 0.0)
    return ComplexPair(torch.embedding(weight.re, indices, padding_idx, *args), rows)


@rule("embedding_bag")
def embedding_bag(
    weight: Any,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    *args: Any,
) -> Any:
    """Sums (mode 0) and means (1) of rows; maxima (2) have no rule."""
    if mode > 1:
        raise RecordError("the complex step has no rule for embedding_bag with mode='max': take tn.Hessian.")

    def rows(w: Tensor, s: Tensor | None) -> Tensor:
        last = bool(args[0]) if args else False
        padding = args[1] if len(args) > 1 else None
        return torch.embedding_bag(w, indices, offsets, scale_grad_by_freq, mode, sparse, s, last, padding)[0]

    bags = multilinear(rows, weight, per_sample_weights)
    return bags, indices, offsets, offsets
