"""One run of an unchanged closure at θ + ihv."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchnewton.curvature.complex_step.pair import (
    USER_RULES,
    ComplexPair,
    Function,
    Run,
    is_pair,
    no_rule,
    re,
    running,
)
from torchnewton.record import Closure, RecordError
from torchnewton.record.recorder import Watcher
from torchnewton.record.replay import (
    BufferSnapshot,
    RandomState,
    differentiable_kernels,
    kept_gradients,
    same_random_numbers,
    scratch_buffers,
)
from torchnewton.vectors import Vector

WAY_OUT = (
    "part of it goes around the rules (a kernel of your own, code that leaves PyTorch, a value that is not the same in "
    "every call of the closure). Register a rule with tn.complex_step_rule(function) or take tn.Hessian."
)
_BACKWARD = (Tensor.backward, torch.autograd.backward)


@dataclass(frozen=True)
class Outcome:
    """Re f, Im f, Im ∇f (None when it was not asked for), the coarsest precision met, the user's rules that ran."""

    value: float
    imaginary: float
    product: Vector | None
    eps: float
    used: set[Function]


class Continuation(Watcher):
    """Puts pairs in the place of live tensors; differentiates the imaginary part of each loss.

    With f(x + iy) = a + ib, Cauchy and Riemann give ∂b/∂x = Im f′: one real backward pass from b.
    """

    def __init__(self, run: Run, places: Sequence[Tensor], differentiate: bool) -> None:
        super().__init__()
        self.run = run
        self.places = list(places)
        self.differentiate = differentiate
        self.total = [torch.zeros_like(x) for x in places]
        self.value, self.imaginary = 0.0, 0.0
        self.depends = False
        self._keep_graph = False

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func in _BACKWARD:
            place = 2
            flags = (*args[place : place + 2], kwargs.get("retain_graph"), kwargs.get("create_graph"))
            self._keep_graph = any(bool(flag) for flag in flags)
        elif not _is_of_the_gradient(func):
            args, kwargs = self._substituted(tuple(args)), self._substituted(dict(kwargs))
        return super().__torch_function__(func, types, args, kwargs)

    def _substituted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self.run.substitutes.get(id(value))
            return value if found is None else found[1]
        if type(value) in (list, tuple):
            return type(value)([self._substituted(item) for item in value])
        if type(value) is dict:
            return {key: self._substituted(item) for key, item in value.items()}
        return value

    def on_backward(self, loss: Tensor, weight: Tensor) -> None:
        """Differentiate at once, so that the graph of a micro-batch can go."""
        loss = self._substituted(loss)
        self.value += float((re(loss).detach() * weight).sum())
        if not isinstance(loss, ComplexPair):
            return
        self.depends = True
        self.imaginary += float((loss.im.detach().double() * weight).sum())
        if not self.differentiate or not loss.im.requires_grad:
            return
        found = torch.autograd.grad(
            loss.im, self.places, weight.to(loss.im.dtype), retain_graph=self._keep_graph, allow_unused=True
        )
        for total, g in zip(self.total, found, strict=True):
            if g is not None:
                total += g


def _is_of_the_gradient(func: Function) -> bool:
    """Whether a call reads or sets an attribute of the live parameter itself, such as `.grad`."""
    name = getattr(func, "__name__", "")
    return name in ("__set__", "__delete__") or (
        name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") == "grad"
    )


def run_closure(
    closure: Closure,
    params: Sequence[Tensor],
    values: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    random_state: RandomState | None,
    buffers: BufferSnapshot | None,
    keeps_squares: bool,
    differentiate: bool = True,
) -> Outcome:
    """Run `closure` with `values` + i `steps` in the place of `params`, from `buffers`; it leaves no trace.

    Frozen parameters (`requires_grad` is False) stay as they are.
    """
    live = [i for i, p in enumerate(params) if p.requires_grad]
    places = [values[i].detach().requires_grad_() for i in live]
    run = Run(keeps_squares)
    for i, place in zip(live, places, strict=True):
        run.substitutes[id(params[i])] = params[i], ComplexPair(place, steps[i])
    mode = Continuation(run, places, differentiate)
    with (
        warnings.catch_warnings(),
        torch.enable_grad(),
        kept_gradients(params),
        same_random_numbers(random_state, [p.device for p in params]),
        scratch_buffers(buffers),
        differentiable_kernels(),
        _without_checkpoints(),
        _guarded_functions(run),
        running(run),
        _explained_errors(),
    ):
        warnings.simplefilter("ignore")  # the real run has shown them
        with mode:
            returned = closure()
        if not mode.backward_values:
            loss = mode._substituted(returned)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise RecordError("the closure returned no scalar loss and called no backward: return the loss.")
            mode.on_backward(loss, torch.ones_like(re(loss)))
    if not mode.depends:
        raise RecordError(f"the parameters reach the loss on no way that the complex step can follow: {WAY_OUT}")
    product = [torch.zeros_like(v) for v in values]
    for i, total in zip(live, mode.total, strict=True):
        product[i] = total
    eps = max(torch.finfo(dtype).eps for dtype in run.dtypes)
    return Outcome(mode.value, mode.imaginary, product if differentiate else None, eps, run.used)


@contextmanager
def _explained_errors() -> Iterator[None]:
    try:
        yield
    except RecordError:
        raise
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise RecordError(
                "an operation in place overwrote a tensor that the complex step needs for its backward pass: write it "
                "out of place (x = x + y, not x += y), or take tn.Hessian."
            ) from error
        raise


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Let checkpointed parts run once and keep their graph: what they keep for a second run are no pairs."""
    from torch.utils import checkpoint

    name = "_checkpoint_without_reentrant_generator"
    original = getattr(checkpoint, name, None)

    def once(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    if original is None:
        yield
        return
    setattr(checkpoint, name, once)
    try:
        yield
    finally:
        setattr(checkpoint, name, original)


@contextmanager
def _guarded_functions(run: Run) -> Iterator[None]:
    """Let a `torch.autograd.Function` that meets a pair use its rule or say that it has none."""
    owner, name = torch.autograd.Function, "apply"
    original = vars(owner)[name]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        replaced = [run.substitutes[id(a)][1] if id(a) in run.substitutes else a for a in args]
        if torch.is_grad_enabled() and any(is_pair(a) for a in (*replaced, *kwargs.values())):
            if cls not in USER_RULES:
                raise no_rule(cls)
            run.used.add(cls)
            return USER_RULES[cls](*replaced, **kwargs)
        return original.__func__(cls, *args, **kwargs)

    setattr(owner, name, classmethod(apply))
    try:
        yield
    finally:
        setattr(owner, name, original)
