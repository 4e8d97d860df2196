"""Independent references from plain autograd: the matrices of a loss ℓ(z(θ)), written row by row.

Nothing here imports torchnewton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """f, ∇f, J = ∂z/∂θ, B = ∂²ℓ/∂z² and G = JᵀBJ, all in float64."""

    loss: Tensor
    gradient: Tensor
    jacobian: Tensor
    output_hessian: Tensor
    gauss_newton: Tensor


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One flat tensor of all entries."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def like(params: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
    """A flat vector cut into the shapes of the parameters."""
    parts = vector.split([p.numel() for p in params])
    return [part.view_as(p).to(p.dtype) for part, p in zip(parts, params, strict=True)]


def derivative(value: Tensor, params: Sequence[Tensor]) -> Tensor:
    """∂value/∂θ as one flat float64 tensor, zeros where θ is frozen or unused."""
    live = [p for p in params if p.requires_grad]
    found = iter(torch.autograd.grad(value, live, retain_graph=True, allow_unused=True))
    rows = [next(found) if p.requires_grad else None for p in params]
    return flat([torch.zeros_like(p) if r is None else r for p, r in zip(params, rows, strict=True)]).double()


def dense_reference(
    params: Sequence[Tensor],
    outputs: Callable[[], Sequence[Tensor]],
    loss: Callable[..., Tensor],
    rest: Callable[[], Tensor] | None = None,
) -> Reference:
    """The matrices of f(θ) = ℓ(z(θ)) + rest(θ), one backward pass a row of J."""
    torch.manual_seed(0)
    z = list(outputs())
    total = loss(*z) + (rest() if rest else 0.0)
    jacobian = torch.stack([derivative(entry, params) for output in z for entry in output.reshape(-1)])

    def of_flat(values: Tensor) -> Tensor:
        parts = values.split([output.numel() for output in z])
        return loss(*(part.view_as(output) for part, output in zip(parts, z, strict=True)))

    output_hessian = torch.autograd.functional.hessian(of_flat, torch.cat([y.detach().reshape(-1) for y in z]))
    output_hessian = output_hessian.double()
    return Reference(
        loss=total.detach(),
        gradient=derivative(total, params),
        jacobian=jacobian,
        output_hessian=output_hessian,
        gauss_newton=jacobian.T @ output_hessian @ jacobian,
    )


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """‖found − expected‖ ≤ rtol ‖expected‖."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    error, scale = float((found - expected).norm()), float(expected.norm())
    assert error <= rtol * scale, f"relative error {error / scale if scale else error:.2e}, allowed {rtol:.0e}"
