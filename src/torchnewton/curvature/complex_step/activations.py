"""Activation functions: smooth ones by their derivative, the others by the branch of the real part."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.complex_step.functions import masked, smooth
from torchnewton.curvature.complex_step.pair import ComplexPair, im, keeps_squares, re, rule

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@rule("relu")
def relu(input: ComplexPair) -> ComplexPair:
    """z where its real part is positive, else 0."""
    imaginary: Tensor = torch.ops.aten.threshold_backward(input.im, input.re, 0)  # one pass; `where` takes three
    return ComplexPair(torch.relu(input.re), imaginary)


@rule("relu6")
def relu6(input: ComplexPair) -> ComplexPair:
    """z between 0 and 6."""
    return hardtanh(input, 0.0, 6.0)


@rule("hardtanh")
def hardtanh(input: ComplexPair, min_val: float = -1.0, max_val: float = 1.0) -> ComplexPair:
    """z between two bounds, with slope 0 at them."""
    x = input.re
    return masked(input, F.hardtanh(x, min_val, max_val), (x > min_val) & (x < max_val))


@rule("threshold")
def threshold(input: ComplexPair, threshold: float, value: float) -> ComplexPair:
    """z above a threshold."""
    return masked(input, F.threshold(input.re, threshold, value), input.re > threshold)


@rule("leaky_relu")
def leaky_relu(input: ComplexPair, negative_slope: float = 0.01) -> ComplexPair:
    """z or a fraction of it."""
    slope = torch.full_like(input.re, negative_slope).masked_fill_(input.re > 0, 1.0)
    return masked(input, F.leaky_relu(input.re, negative_slope), slope)


@rule("prelu")
def prelu(input: Any, weight: Any) -> Any:
    """z or wz, w a parameter for all channels or for each."""
    if weight.numel() > 1:
        weight = weight.reshape(-1, *[1] * (input.dim() - 2)) if input.dim() > 1 else weight
    return torch.where(re(input) > 0, input, weight * input)


@rule("rrelu")
def rrelu(
    input: ComplexPair, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, *args: Any
) -> ComplexPair:
    """z or a random fraction of it, drawn as the real function draws it."""
    value = torch.rrelu(input.re.detach(), lower, upper, training)
    slope = torch.where(input.re > 0, 1.0, value / input.re.detach())
    return ComplexPair(input.re * slope, input.im * slope)


@rule("hardshrink")
def hardshrink(input: ComplexPair, lambd: float = 0.5) -> ComplexPair:
    """z outside of ±λ."""
    return masked(input, F.hardshrink(input.re, lambd), input.re.abs() > lambd)


@rule("softshrink")
def softshrink(input: ComplexPair, lambd: float = 0.5) -> ComplexPair:
    """z ∓ λ outside of ±λ."""
    return masked(input, F.softshrink(input.re, lambd), input.re.abs() > lambd)


@rule("hardsigmoid")
def hardsigmoid(input: ComplexPair) -> ComplexPair:
    """z/6 + ½ within ±3; PyTorch's own keeps 1/6 in single precision."""
    x = input.re
    return masked(input, (x + 3).clamp(0, 6) / 6, (x.abs() < 3).to(x.dtype) / 6)


@rule("hardswish")
def hardswish(input: ComplexPair) -> Any:
    """z · hardsigmoid z."""
    return input * hardsigmoid(input)


def elu_of(input: ComplexPair, alpha: float, scale: float, input_scale: float) -> Tensor:
    """scale · z, or scale · α(exp(input_scale · z) − 1) where the real part is negative."""
    negative = torch.where(input.re > 0, 0.0, 1.0).to(input.re.dtype) * input  # exp is not to overflow elsewhere
    return scale * torch.where(input.re > 0, input, alpha * torch.expm1(input_scale * negative))


@rule("elu")
def elu(input: ComplexPair, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """z or α(exp z − 1)."""
    return elu_of(input, alpha, scale, input_scale)


@rule("selu")
def selu(input: ComplexPair) -> Tensor:
    """The self-normalizing one."""
    return elu_of(input, _SELU_ALPHA, _SELU_SCALE, 1.0)


@rule("celu")
def celu(input: ComplexPair, alpha: float = 1.0) -> Tensor:
    """z or α(exp(z/α) − 1)."""
    return elu_of(input, alpha, 1.0, 1 / alpha)


@rule("gelu")
def gelu(input: ComplexPair, *, approximate: str = "none") -> Any:
    """zΦ(z), or its approximation by tanh."""
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (input + 0.044715 * input * input * input)
        return 0.5 * input * (1 + torch.tanh(inner))
    if keeps_squares():
        return 0.5 * input * (1 + torch.erf(input / math.sqrt(2.0)))
    x = input.re
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return ComplexPair(F.gelu(x), (0.5 * (1 + torch.erf(x / math.sqrt(2.0))) + x * density) * input.im)


@rule("silu")
def silu(input: ComplexPair) -> Any:
    """z σ(z)."""
    if keeps_squares():
        return input * torch.sigmoid(input)
    s = torch.sigmoid(input.re)
    return ComplexPair(F.silu(input.re), s * (1 + input.re * (1 - s)) * input.im)


@rule("mish")
def mish(input: ComplexPair) -> Any:
    """z tanh(softplus z)."""
    return input * torch.tanh(softplus(input))


@rule("softplus")
def softplus(input: ComplexPair, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp βz)/β, or z beyond the threshold."""
    if keeps_squares():
        low = torch.where(input.re * beta > threshold, 0.0, input)
        return torch.where(input.re * beta > threshold, input, torch.log1p(torch.exp(beta * low)) / beta)
    slope = torch.where(input.re * beta > threshold, 1.0, torch.sigmoid(beta * input.re))
    return masked(input, F.softplus(input.re, beta, threshold), slope)


@rule("log_sigmoid", "logsigmoid")
def log_sigmoid(input: ComplexPair) -> ComplexPair:
    """log σ(z) = −log(1 + exp(−z))."""

    def exact(w: Tensor) -> Tensor:
        far = w.real < 0
        return torch.where(far, w, 0.0) - torch.log1p(torch.exp(torch.where(far, w, -w)))

    return smooth(F.logsigmoid, lambda x, f: torch.sigmoid(-x), input, exact)


@rule("logit")
def logit(input: ComplexPair, eps: float | None = None) -> Any:
    """log(z/(1 − z))."""
    z: Any = input if eps is None else torch.clamp(input, eps, 1 - eps)
    return torch.log(z / (1 - z))


@rule("glu")
def glu(input: ComplexPair, dim: int = -1) -> Any:
    """One half times the sigmoid of the other."""
    a, b = input.chunk(2, dim)
    return a * torch.sigmoid(b)


def shifted(input: ComplexPair, dim: Any) -> ComplexPair:
    """z minus the greatest real part: what exp can take."""
    top = input.re.detach().amax(dim, keepdim=True)
    return ComplexPair(input.re - torch.where(torch.isinf(top), 0.0, top), input.im)


def _cast(input: ComplexPair, dtype: torch.dtype | None) -> Any:
    return input if dtype is None else input.to(dtype)


@rule("softmax", "_softmax")
def softmax(input: ComplexPair, dim: int, dtype: torch.dtype | None = None) -> Any:
    """exp z/Σ exp z: with s = softmax x, (s, s(y − Σsy))."""
    input = _cast(input, dtype if isinstance(dtype, torch.dtype) else None)
    if keeps_squares():
        e = torch.exp(shifted(input, dim))
        return e / e.sum(dim, keepdim=True)
    s = torch.softmax(input.re, dim)
    moved = s * input.im
    return ComplexPair(s, moved - s * moved.sum(dim, keepdim=True))


@rule("log_softmax", "_log_softmax")
def log_softmax(input: ComplexPair, dim: int, dtype: torch.dtype | None = None) -> Any:
    """z − log Σ exp z: with s = softmax x, (log s, y − Σsy)."""
    input = _cast(input, dtype if isinstance(dtype, torch.dtype) else None)
    if keeps_squares():
        z = shifted(input, dim)
        return z - torch.log(torch.exp(z).sum(dim, keepdim=True))
    logs = torch.log_softmax(input.re, dim)
    return ComplexPair(logs, input.im - (logs.exp() * input.im).sum(dim, keepdim=True))


@rule("logsumexp")
def logsumexp(input: ComplexPair, dim: Any, keepdim: bool = False) -> Any:
    """log Σ exp z, shifted by the greatest real part."""
    value = torch.logsumexp(input.re, dim, keepdim=True)
    if keeps_squares():
        z = shifted(input, dim)
        total = torch.log(torch.exp(z).sum(dim, keepdim=True)) + (input.re - z.re).detach().amax(dim, keepdim=True)
    else:
        weights = torch.exp(input.re - value)
        total = ComplexPair(value, (weights * im(input)).sum(dim, keepdim=True))
    return total if keepdim else total.squeeze(dim)
