"""Functions of one number, by their derivative; powers; what branches: clamp, maximum, sorting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchnewton.curvature.complex_step.pair import (
    ComplexPair,
    im,
    is_pair,
    keeps_squares,
    re,
    rule,
)

Derivative = Callable[[Tensor, Tensor], Tensor]
_SQRT_2, _SQRT_PI = math.sqrt(2.0), math.sqrt(math.pi)


def smooth(
    f: Callable[[Tensor], Tensor], df: Derivative, z: ComplexPair, exact: Callable[[Tensor], Tensor] | None = None
) -> ComplexPair:
    """f(x) + i f′(x) y, which is f(x + iy) up to y²; where squares count, `exact` of a complex tensor (default f)."""
    if keeps_squares():
        w = (exact or f)(torch.complex(z.re, z.im))
        return ComplexPair(w.real, w.imag)
    value = f(z.re)
    return ComplexPair(value, df(z.re, value) * z.im)


# name: (f, f′(x, f(x))); f is continued by PyTorch's complex function of that name where squares count
_SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Derivative]] = {
    "exp": (torch.exp, lambda x, f: f),
    "exp2": (torch.exp2, lambda x, f: math.log(2.0) * f),
    "expm1": (torch.expm1, lambda x, f: f + 1),
    "log": (torch.log, lambda x, f: 1 / x),
    "log2": (torch.log2, lambda x, f: 1 / (math.log(2.0) * x)),
    "log10": (torch.log10, lambda x, f: 1 / (math.log(10.0) * x)),
    "log1p": (torch.log1p, lambda x, f: 1 / (1 + x)),
    "sqrt": (torch.sqrt, lambda x, f: 0.5 / f),
    "rsqrt": (torch.rsqrt, lambda x, f: -0.5 * f / x),
    "sin": (torch.sin, lambda x, f: torch.cos(x)),
    "cos": (torch.cos, lambda x, f: -torch.sin(x)),
    "tan": (torch.tan, lambda x, f: 1 + f * f),
    "sinh": (torch.sinh, lambda x, f: torch.cosh(x)),
    "cosh": (torch.cosh, lambda x, f: torch.sinh(x)),
    "tanh": (torch.tanh, lambda x, f: 1 - f * f),
    "asin": (torch.asin, lambda x, f: torch.rsqrt(1 - x * x)),
    "acos": (torch.acos, lambda x, f: -torch.rsqrt(1 - x * x)),
    "atan": (torch.atan, lambda x, f: 1 / (1 + x * x)),
    "asinh": (torch.asinh, lambda x, f: torch.rsqrt(1 + x * x)),
    "acosh": (torch.acosh, lambda x, f: torch.rsqrt(x * x - 1)),
    "atanh": (torch.atanh, lambda x, f: 1 / (1 - x * x)),
    "sigmoid": (torch.sigmoid, lambda x, f: f * (1 - f)),
    "sinc": (torch.sinc, lambda x, f: _dsinc(x, f)),
}
_ALIASES = {"sigmoid": "expit", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}


def _dsinc(x: Tensor, f: Tensor) -> Tensor:
    inside = torch.where(x == 0, 1.0, x)
    return torch.where(x == 0, -(math.pi**2) / 3 * x, (torch.cos(math.pi * x) - f) / inside)


def _add_smooth(name: str) -> None:
    f, df = _SMOOTH[name]

    def apply(input: ComplexPair) -> ComplexPair:
        return smooth(f, df, input)

    rule(name, _ALIASES.get(name, name))(apply)


for _name in _SMOOTH:
    _add_smooth(_name)


def _erf(w: Tensor) -> Tensor:
    """erf(x + iy) by seven terms of its series in y: only for y below about 0.1."""
    x, y = w.real, w.imag
    term = 2 / _SQRT_PI * torch.exp(-x * x)
    h = [torch.ones_like(x), 2 * x]  # Hermite polynomials: erf⁽ⁿ⁺¹⁾ = (−1)ⁿ Hₙ e^{−x²} 2/√π
    for n in range(1, 7):
        h.append(2 * x * h[n] - 2 * n * h[n - 1])
    powers = [y ** (n + 1) / math.factorial(n + 1) for n in range(7)]
    real = torch.erf(x) + term * (h[1] * powers[1] - h[3] * powers[3] + h[5] * powers[5])
    return torch.complex(real, term * (powers[0] - h[2] * powers[2] + h[4] * powers[4] - h[6] * powers[6]))


@rule("erf")
def erf(input: ComplexPair) -> ComplexPair:
    """erf z."""
    return smooth(torch.erf, lambda x, f: 2 / _SQRT_PI * torch.exp(-x * x), input, _erf)


@rule("erfc")
def erfc(input: ComplexPair) -> ComplexPair:
    """1 − erf z."""
    return smooth(torch.erfc, lambda x, f: -2 / _SQRT_PI * torch.exp(-x * x), input, lambda w: 1 - _erf(w))


@rule("lgamma", "gammaln")
def lgamma(input: ComplexPair) -> ComplexPair:
    """log Γ(z); to first order in the imaginary part."""
    return ComplexPair(torch.lgamma(input.re), torch.digamma(input.re) * input.im)


@rule("digamma", "psi")
def digamma(input: ComplexPair) -> ComplexPair:
    """ψ(z); to first order in the imaginary part."""
    return ComplexPair(torch.digamma(input.re), torch.polygamma(1, input.re) * input.im)


@rule("float_power")
def float_power(input: Any, exponent: Any) -> Any:
    """z₁ to the power z₂, in double precision."""
    return pow(input.double() if isinstance(input, Tensor) else input, exponent)


@rule("pow", "__pow__")
def pow(input: Any, exponent: Any) -> Any:
    """z₁ to the power z₂; an exponent that moves needs a positive base."""
    if not is_pair(exponent):
        n = exponent
        if isinstance(n, (int, float)) and n in (1, 2):
            return input.clone() if n == 1 else input.square()
        return smooth(lambda x: x**n, lambda x, f: _slope_of_power(x, n), input)
    base = (
        input if isinstance(input, Tensor) else torch.tensor(float(input), dtype=exponent.dtype, device=exponent.device)
    )
    return torch.exp(exponent * torch.log(base))


def _slope_of_power(x: Tensor, n: Any) -> Tensor:
    """nxⁿ⁻¹, 0 for n = 0 also at x = 0."""
    if not isinstance(n, Tensor):
        return n * x ** (n - 1) if n else torch.zeros_like(x)
    is_constant = n == 0
    slope: Tensor = torch.where(is_constant, 0.0, n * torch.where(is_constant, 1.0, x) ** (n - 1))
    return slope


@rule("xlogy")
def xlogy(input: Any, other: Any) -> Any:
    """z₁ log z₂, 0 where the real part of z₁ is."""
    value = torch.where(re(input) == 0, 1.0, re(other))
    return input * torch.log(ComplexPair(value, im(other)) if is_pair(other) else value)


@rule("atan2", "arctan2")
def atan2(input: Any, other: Any) -> ComplexPair:
    """The angle of (z₂, z₁); to first order in the imaginary parts."""
    y, x = re(input), re(other)
    return ComplexPair(torch.atan2(y, x), (x * im(input) - y * im(other)) / (x * x + y * y))


@rule("hypot")
def hypot(input: Any, other: Any) -> Any:
    """√(z₁² + z₂²)."""
    return torch.sqrt(input * input + other * other)


@rule("logaddexp")
def logaddexp(input: Any, other: Any) -> Any:
    """log(exp z₁ + exp z₂), shifted by the greater real part."""
    top = torch.maximum(re(input), re(other)).detach()
    return top + torch.log(torch.exp(input - top) + torch.exp(other - top))


# --- branches --------------------------------------------------------------------------------------------------------


def masked(z: ComplexPair, value: Tensor, slope: Tensor) -> ComplexPair:
    """A piecewise linear function: its value, and its slope as the factor of the imaginary part."""
    return ComplexPair(value, z.im * slope)


@rule("abs", "absolute", "fabs")
def absolute(input: ComplexPair) -> Tensor:
    """z with the sign that makes its real part positive, 0 at 0: no modulus."""
    if input.re.is_complex():  # a modulus of the closure's own complex numbers, an analytic function of its two parts
        return torch.sqrt(input.real.square() + input.imag.square())
    return masked(input, input.re.abs(), input.re.sign())


def bounded(input: Any, low: Any, high: Any) -> Any:
    """Within [low, high]; at a bound the slope is that of the inside, as for autograd."""
    inside = torch.ones_like(re(input), dtype=torch.bool)
    for bound, beyond in ((low, torch.lt), (high, torch.gt)):
        if bound is not None:
            outside = beyond(re(input), re(bound))
            inside = inside & ~outside
    value = torch.clamp(re(input), re(low), re(high))
    imaginary = im(input) * inside
    if is_pair(low):
        imaginary = imaginary + torch.where(re(input) < low.re, low.im, 0.0)
    if is_pair(high):
        imaginary = torch.where(re(input) > high.re, high.im, imaginary)
    return ComplexPair(value, imaginary)


@rule("clamp", "clip")
def clamp_between(input: Any, min: Any = None, max: Any = None) -> Any:
    """Within [min, max]."""
    return bounded(input, min, max)


@rule("clamp_min")
def clamp_min(input: Any, min: Any) -> Any:
    """At least min."""
    return bounded(input, min, None)


@rule("clamp_max")
def clamp_max(input: Any, max: Any) -> Any:
    """At most max."""
    return bounded(input, None, max)


@rule("maximum", "fmax")
def maximum(input: Any, other: Any) -> ComplexPair:
    """The one with the greater real part, the mean of the two where they are equal."""
    a, b = re(input), re(other)
    share = 0.5 * ((a > b).to(a.dtype) - (a < b).to(a.dtype) + 1)
    return ComplexPair(torch.maximum(a, b), share * im(input) + (1 - share) * im(other))


@rule("minimum", "fmin")
def minimum(input: Any, other: Any) -> Any:
    """The one with the smaller real part."""
    return -maximum(-input, -other)


def _picked(name: str) -> None:
    def pick(input: ComplexPair, *args: Any, **kwargs: Any) -> Any:
        dim = args[0] if args and name in ("max", "min", "median", "nanmedian") else None
        if name in ("max", "min") and isinstance(dim, Tensor):
            return (maximum if name == "max" else minimum)(input, dim)
        if name in ("max", "min") and not args and not kwargs:
            return extreme(input, name)
        found = getattr(torch, name)(input.re, *args, **kwargs)
        if isinstance(found, Tensor):  # median of all entries
            index = (input.re == found).flatten().nonzero()[0]
            return ComplexPair(found, input.im.flatten()[index].squeeze())
        values, indices = found
        axis, keeps = _axis(name, args, kwargs)
        full = indices if keeps else indices.unsqueeze(axis)
        imaginary = input.im.gather(axis, full) if input.im.dim() else input.im
        return type(found)((ComplexPair(values, imaginary if keeps else imaginary.squeeze(axis)), indices))

    rule(name)(pick)


def _axis(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, bool]:
    """The dimension of a selection, and whether it stays."""
    if name in ("sort", "topk"):
        place = 1 if name == "topk" else 0
        given = args[place] if len(args) > place and not isinstance(args[place], bool) else kwargs.get("dim", -1)
        return int(given), True
    if name in ("cummax", "cummin"):
        return int(args[0] if args else kwargs["dim"]), True
    place = 1 if name == "kthvalue" else 0
    dim = args[place] if len(args) > place else kwargs.get("dim", -1)
    return int(dim), bool(args[place + 1] if len(args) > place + 1 else kwargs.get("keepdim", False))


for _name in ("max", "min", "sort", "topk", "kthvalue", "median", "nanmedian", "mode", "cummax", "cummin"):
    _picked(_name)


def extreme(input: ComplexPair, name: str, dim: Any = (), keepdim: bool = False) -> ComplexPair:
    """The mean of the entries whose real part is the greatest or smallest."""
    f = torch.amax if name == "max" else torch.amin
    best = f(input.re, dim, keepdim=True)
    share = (input.re == best).to(input.re.dtype)
    share = share / share.sum(dim, keepdim=True) if dim != () else share / share.sum()
    total = (input.im * share).sum(dim, keepdim=keepdim) if dim != () else (input.im * share).sum()
    return ComplexPair(f(input.re, dim, keepdim=keepdim), total)


@rule("amax")
def amax(input: ComplexPair, dim: Any = (), keepdim: bool = False) -> ComplexPair:
    """The greatest by the real part."""
    return extreme(input, "max", dim, keepdim)


@rule("amin")
def amin(input: ComplexPair, dim: Any = (), keepdim: bool = False) -> ComplexPair:
    """The smallest by the real part."""
    return extreme(input, "min", dim, keepdim)


@rule("aminmax")
def aminmax(input: ComplexPair, *, dim: Any = (), keepdim: bool = False) -> Any:
    """Both."""
    return extreme(input, "min", dim, keepdim), extreme(input, "max", dim, keepdim)
