"""The step of `benchmarks.plane_step` in bare calls of torch: what its arithmetic takes without the library."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchnewton.curvature import LinearOperator

SPACING = torch.finfo(torch.float32).eps ** 0.5


def step_by_hand(model: nn.Module, x: Tensor, y: Tensor, M: LinearOperator, last: list[Tensor], damping: float) -> None:
    """Moves the parameters by −α M∇f + μ · `last`, which minimizes the damped model of a cross entropy.

    The product with the Kronecker inverses is the library's, which is matrix products alone.
    """
    names, params = zip(*model.named_parameters(), strict=True)
    z = model(x)
    gradient = torch.autograd.grad(F.cross_entropy(z, y), params)
    with torch.no_grad():
        b = [-g for g in gradient]
        D = [M @ b, last]
        size = max(1.0, float(_norm(params)))
        U = []
        for d in D:
            h = SPACING * size / float(_norm(d))
            ahead = torch._foreach_add(params, d, alpha=h)
            U.append((torch.func.functional_call(model, dict(zip(names, ahead, strict=True)), (x,)) - z) / h)
        p = z.softmax(1)
        BU = [p * (u - (p * u).sum(1, keepdim=True)) / len(x) for u in U]
        A = [torch.dot(u.flatten(), v.flatten()) for u, v in product(U, BU)]
        gram = [_dot(d, e) for d, e in product(D, D)]
        matrix = torch.stack(A).view(2, 2) + damping * torch.stack(gram).view(2, 2)
        alpha, mu = torch.linalg.solve(matrix, torch.stack([_dot(b, d) for d in D])).tolist()
        torch._foreach_add_(params, D[0], alpha=alpha)
        torch._foreach_add_(params, D[1], alpha=mu)


def _norm(v: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(v)).norm()


def _dot(v: list[Tensor], w: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(v, w, strict=True)]).sum()
