"""Running a closure so that one backward pass gives a row of the Jacobian for every sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.record.call import replaced, tensors_in
from torchnewton.record.losses import Function
from torchnewton.record.recorder import Recorder


class NotPerSampleError(RuntimeError):
    """The closure does not treat samples independently in a way that can be seen; the message says where."""


class PerSample(Recorder):
    """Replays a closure; a call that uses a parameter gets the parameter once per sample of its other input.

    With W expanded to (N, *W.shape) a call f(x, W) becomes the N calls f(xᵢ, Wᵢ), run as one by `torch.func.vmap`.
    If the network treats samples independently, the derivative of Σᵢ zᵢ in Wᵢ is then the row ∂zᵢ/∂W, of a network
    with several uses of W and of a loss with derivatives inside as well. What is computed from parameters alone
    (a transposed or normalized weight) is computed per sample when a call with samples needs it. A linear layer keeps
    its one matrix product: see `PairedProduct`.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params, create_graph=False)
        self._copies: dict[tuple[int, int], Tensor] = {}
        self._position = {id(p): i for i, p in enumerate(params)}
        self._live = {i for i, p in enumerate(params) if p.requires_grad}
        self._derived: dict[int, tuple[Tensor, Callable[[int], Tensor]]] = {}
        self._pairs = Pairs(params[0])

    def on_backward(self, loss: Tensor, weight: Tensor) -> None:
        """Keep the graph as it is: nothing is differentiated while it runs."""

    def rows(self, total: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
        """For `total` = Σᵢ zᵢ over n samples: (position of a live parameter, its part of the rows, n × entries)."""
        wanted = [(position, copy) for (position, count), copy in self._copies.items() if count == n]
        leaves = [*(copy for _, copy in wanted), self._pairs.token]
        try:
            with self._pairs.collecting():
                found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise NotPerSampleError(str(error).split("\n")[0]) from error
        for (position, _), g in zip(wanted, found, strict=False):
            if g is not None and position in self._live:
                yield position, g.reshape(n, -1)
        yield from ((position, part) for position, part in self._pairs.products(n) if position in self._live)

    def on_call(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the call, per sample where it mixes parameters and samples."""
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        shared = [self._is_shared(t) for t in tensors]
        if not any(shared):
            return super().on_call(func, args, kwargs)
        samples = next((t for t, s in zip(tensors, shared, strict=True) if not s and t.dim()), None)
        if samples is None:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.is_floating_point():
                self._derived[id(result)] = (result, lambda n: self._mapped(func, args, kwargs, n))
            return result
        positions = [self._position.get(id(t)) for t in tensors[1:]]
        plain = samples.dtype == self.params[0].dtype and not torch.is_autocast_enabled(samples.device.type)
        if func is F.linear and plain and tensors[0] is samples and samples.dim() > 1 and None not in positions:
            return self._linear(samples, [p for p in positions if p is not None])
        return self._mapped(func, args, kwargs, samples.shape[0])

    def _is_shared(self, tensor: Tensor) -> bool:
        return id(tensor) in self._position or id(tensor) in self._derived

    def _linear(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        weight = self.params[positions[0]].detach()
        y = _paired_product(x, weight, self._pairs.token, self._pairs, positions, False)
        return y + self.params[positions[1]].detach() if len(positions) > 1 else y

    def _copies_of(self, tensor: Tensor, n: int) -> Tensor:
        if id(tensor) in self._derived:
            return self._derived[id(tensor)][1](n)
        key = (self._position[id(tensor)], n)
        if key not in self._copies:
            self._copies[key] = tensor.detach().expand(n, *tensor.shape).requires_grad_()
        return self._copies[key]

    def _mapped(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], n: int) -> Tensor:
        inputs: list[Tensor] = []
        in_dims: list[int | None] = []
        sampled: list[bool] = []
        for tensor in [*tensors_in(args), *tensors_in(kwargs)]:
            shared = self._is_shared(tensor)
            sampled.append(not shared and tensor.dim() > 0 and tensor.shape[0] == n)
            inputs.append(self._copies_of(tensor, n) if shared else tensor)
            in_dims.append(0 if shared or sampled[-1] else None)

        def one(*tensors: Tensor) -> Tensor:
            parts = iter([t.unsqueeze(0) if s else t for t, s in zip(tensors, sampled, strict=True)])
            result = func(*replaced(args, parts), **dict(zip(kwargs, replaced(kwargs.values(), parts), strict=True)))
            if not isinstance(result, Tensor) or (any(sampled) and result.shape[:1] != (1,)):
                raise NotPerSampleError(f"{func.__name__} does not keep the sample dimension")
            return result.squeeze(0) if any(sampled) else result

        mapped: Tensor = torch.func.vmap(one, in_dims=tuple(in_dims))(*inputs)
        return mapped


class Pairs:
    """The pairs (a, b) of each sample whose outer products Σ a bᵀ are its derivative in a weight.

    `token` is a leaf that every product takes: a backward pass towards it visits them all.
    """

    def __init__(self, like: Tensor) -> None:
        self.token = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        self.active = False
        self._found: dict[tuple[int, int], list[tuple[Tensor, Tensor | None]]] = {}

    def collecting(self) -> Pairs:
        """Collect anew inside the `with` block."""
        self._found = {}
        return self

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_: object) -> None:
        self.active = False

    def add(self, position: int, a: Tensor, b: Tensor | None) -> None:
        """Σ a bᵀ over all but the first and last dimension; Σ a where b is None."""
        self._found.setdefault((position, a.shape[0]), []).append((a.detach(), b if b is None else b.detach()))

    def products(self, n: int) -> Iterator[tuple[int, Tensor]]:
        """(position, n × entries) of every weight and bias with n samples."""
        for (position, count), pairs in self._found.items():
            if count != n:
                continue
            left = torch.cat([a.reshape(n, -1, a.shape[-1]) for a, _ in pairs], dim=1)
            rights = [b.reshape(n, -1, b.shape[-1]) for _, b in pairs if b is not None]
            if rights:
                yield position, torch.bmm(left.mT, torch.cat(rights, dim=1)).reshape(n, -1)
            else:
                yield position, left.sum(dim=1)


class PairedProduct(torch.autograd.Function):
    """x Wᵀ (or x W, `transposed`) with W constant, telling `Pairs` what a derivative in W would be made of.

    The derivative of either form in x is the other one, so derivatives of any order, as a physics-informed loss
    takes them, consist of such products, and each contributes pairs of the same shape.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        token: Tensor,
        pairs: Pairs,
        positions: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x, weight, token)
        ctx.pairs, ctx.positions, ctx.transposed = pairs, positions, transposed
        return x @ (weight if transposed else weight.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The product with the other form, and the pairs where they are being collected."""
        (grad,) = grads
        x, weight, token = ctx.saved_tensors
        if ctx.pairs.active:
            a, b = (x, grad) if ctx.transposed else (grad, x)
            ctx.pairs.add(ctx.positions[0], a, b)
            if len(ctx.positions) > 1:
                ctx.pairs.add(ctx.positions[1], grad, None)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        back = _paired_product(grad, weight, token, ctx.pairs, ctx.positions[:1], not ctx.transposed)
        return back, None, None, None, None, None


_paired_product: Callable[..., Tensor] = PairedProduct.apply
