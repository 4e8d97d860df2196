"""Complex numbers as pairs of real tensors, and the table that continues an operation on them.

A pair looks to the closure like its real part: shape, dtype, comparisons and `item()` are those of real numbers. A
torch function that meets a pair is looked up in the table of rules; what is not there raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchnewton.record import RecordError

Function = Callable[..., Any]
Rule = Callable[..., Any]
F = TypeVar("F", bound=Function)


class ComplexPair(Tensor):
    """z = x + iy: the real tensors `re` = x and `im` = y of one shape and dtype.

    Torch functions on pairs follow the rules of the complex step: each is continued analytically, each branch is taken
    on the real part.

    >>> z = ComplexPair(torch.tensor([2.0]), torch.tensor([1e-20]))
    >>> (z * z).im
    tensor([4.0000e-20])
    """

    re: Tensor
    im: Tensor

    def __new__(cls, re: Tensor, im: Tensor) -> ComplexPair:
        """A tensor without memory of its own; it has the real part's shape, dtype and device."""
        return Tensor._make_wrapper_subclass(cls, re.shape, dtype=re.dtype, device=re.device)

    def __init__(self, re: Tensor, im: Tensor) -> None:
        if im.shape != re.shape:
            im = im.expand(re.shape).contiguous()
        self.re = re
        self.im = im if im.dtype == re.dtype else im.to(re.dtype)
        run = _RUN.get()
        if run is not None and re.dtype not in run.dtypes:
            run.dtypes.add(re.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look the function up and apply its rule."""
        return continued(func, args, kwargs or {})

    __torch_dispatch__: Any = classmethod(lambda cls, func, *_: _refuse(func))  # it has gone around the torch functions


@dataclass
class Run:
    """What one run of a closure on pairs shares.

    `substitutes` are the pairs that stand for live tensors (the parameters, and tensors that a pair was written into);
    `keeps_squares` says whether products of two imaginary parts count: for h² below rounding they do not.
    """

    keeps_squares: bool = False
    substitutes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)
    used: set[Function] = field(default_factory=set)


_RUN: ContextVar[Run | None] = ContextVar("run", default=None)


@contextmanager
def running(run: Run) -> Iterator[None]:
    """Let rules see `run`."""
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)


def keeps_squares() -> bool:
    """Whether products of two imaginary parts count in this run."""
    run = _RUN.get()
    return run is not None and run.keeps_squares


# --- the table -------------------------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {}  # by the compiled function's name: `add` holds for +, torch.add, Tensor.add, add_
PYTHON_RULES: dict[Function, Rule] = {}  # functions written in Python whose body is not to be run
IN_PLACE_RULES: dict[str, Rule] = {}  # in place without a copy; all others have the rule of the plain one
CONSTANTS: set[str] = set()  # functions whose result does not move with θ: run on the real parts
USER_RULES: dict[Function, Rule] = {}

_DUNDERS = {
    "__radd__": "add",
    "__rmul__": "mul",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__invert__": "bitwise_not",
    "__iadd__": "add_",
    "__isub__": "sub_",
    "__imul__": "mul_",
    "__itruediv__": "div_",
    "__truediv__": "div",
    "__pos__": "positive",
}
_PREFIXES = ("linalg_", "special_", "fft_")


def rule(*names: str) -> Callable[[F], F]:
    """Add a rule for compiled functions of these names. It takes the arguments of the function, some of them pairs."""

    def add(function: F) -> F:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def complex_step_rule(function: Function) -> Callable[[F], F]:
    """Register the analytic continuation of `function` for `ComplexStepHessian`; a decorator.

    `function` is a torch function, a `torch.autograd.Function` class or any function that calls
    `torch.overrides.handle_torch_function`. The rule takes the arguments of a call, with a `ComplexPair` for each that
    depends on the parameters, and returns one: f(x) + i f′(x) y, made of operations that autograd can differentiate.

        @tn.complex_step_rule(torch.special.i0)
        def i0(z):
            return tn.ComplexPair(torch.special.i0(z.re), torch.special.i1(z.re) * z.im)

    A rule registered here wins over one of the library's.
    """
    if not callable(function):
        raise ValueError(
            f"complex_step_rule({function!r}): give the function itself, as in complex_step_rule(torch.erf)."
        )

    def add(rule: F) -> F:
        USER_RULES[function] = rule
        _found.pop(function, None)
        return rule

    return add


def no_rule(func: Function) -> RecordError:
    """What to say about a function without a rule."""
    module = (getattr(func, "__module__", None) or "").replace("torch._C._nn", "torch.nn.functional")
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = f"Tensor.{_attribute(func)}"
    called = f"{module}.{name}" if module and "_C" not in module else name
    return RecordError(
        f"the complex step has no rule for {called}: no analytic continuation of it is known here. Register one:\n\n"
        f"    @tn.complex_step_rule({called})\n"
        "    def rule(z, ...):  # pairs in the place of the arguments that depend on the parameters\n"
        "        return tn.ComplexPair(f(z.re), df(z.re) * z.im)\n\n"
        "or take tn.Hessian, which differentiates twice."
    )


def _refuse(func: Function) -> Any:
    raise no_rule(func)


def is_pair(value: Any) -> bool:
    """Whether `value` is a pair."""
    return isinstance(value, ComplexPair)


def re(value: Any) -> Any:
    """The real part; what is no pair stays, also inside of lists, tuples and dictionaries."""
    return mapped(lambda z: z.re, value)


def im(value: Any) -> Any:
    """The imaginary part, zero for a real tensor or number."""
    if isinstance(value, ComplexPair):
        return value.im
    return torch.zeros_like(value) if isinstance(value, Tensor) else 0.0


def mapped(f: Callable[[ComplexPair], Any], value: Any) -> Any:
    """`value` with f applied to the pairs in it."""
    if isinstance(value, ComplexPair):
        return f(value)
    if type(value) in (list, tuple):
        return type(value)([mapped(f, item) for item in value])
    if type(value) is dict:
        return {key: mapped(f, item) for key, item in value.items()}
    return value


def paired(real: Any, imaginary: Any) -> Any:
    """Pairs from two results of one structure; what is no floating-point tensor is taken from the first."""
    if isinstance(real, Tensor):
        return ComplexPair(real, imaginary) if real.is_floating_point() or real.is_complex() else real
    if isinstance(real, (list, tuple)):
        parts = [paired(a, b) for a, b in zip(real, imaginary, strict=True)]
        return type(real)(parts) if type(real) in (list, tuple, torch.Size) else tuple(parts)
    return real


# --- finding a rule --------------------------------------------------------------------------------------------------

_found: dict[Function, Rule] = {}  # cache: function → what to call with (args, kwargs)


def continued(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """func(*args, **kwargs) continued to the pairs among the arguments."""
    if not torch.is_grad_enabled():
        return _constant(func)(args, kwargs)
    apply = _found.get(func)
    if apply is None:
        apply = _find(func)
        if getattr(func, "__name__", "") not in ("__get__", "__set__"):  # a new object at each access
            _found[func] = apply
    return apply(args, kwargs)


def _find(func: Function) -> Rule:
    if func in USER_RULES:
        return _by_user(func, USER_RULES[func])
    if func in PYTHON_RULES:
        return _plain(PYTHON_RULES[func])
    if isinstance(func, FunctionType) and "super" not in func.__code__.co_names:  # else a thin shell of a compiled one
        return _expanded(func)
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return _found_attribute(func, name)
    name = _DUNDERS.get(name, name)
    for candidate in (name, *(name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix))):
        if candidate in CONSTANTS:
            return _constant(func)
        if candidate in RULES:
            return _plain(RULES[candidate], func)
        if candidate in IN_PLACE_RULES:
            return _plain(IN_PLACE_RULES[candidate])
        if candidate.endswith("_") and not candidate.endswith("__") and candidate[:-1] in RULES:
            return _in_place(_plain(RULES[candidate[:-1]], func), func)
    raise no_rule(func)


def _attribute(func: Function) -> str:
    return str(getattr(getattr(func, "__self__", None), "__name__", ""))


def _found_attribute(func: Function, access: str) -> Rule:
    name = _attribute(func)
    if access == "__set__":
        raise RecordError(f"the complex step cannot assign to .{name} of a tensor that depends on the parameters.")
    if name in CONSTANTS:
        return _constant(func)
    if name in RULES:
        return _plain(RULES[name], func)
    raise no_rule(func)


def _plain(rule: Rule, func: Function | None = None) -> Rule:
    """Call a rule; linear ones are marked to take the function itself as well."""
    if getattr(rule, "takes_function", False):
        return lambda args, kwargs: rule(func, args, kwargs)
    return lambda args, kwargs: rule(*args, **kwargs)


def _by_user(func: Function, rule: Rule) -> Rule:
    def apply(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        run = _RUN.get()
        if run is not None:
            run.used.add(func)
        return rule(*args, **kwargs)

    return apply


def _constant(func: Function) -> Rule:
    def apply(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        result = func(*re(tuple(args)), **re(dict(kwargs)))
        if args and isinstance(args[0], ComplexPair) and result is args[0].re:
            return args[0]  # in place, without a graph
        return result

    return apply


def _in_place(apply: Rule, func: Function) -> Rule:
    """Apply a rule to a copy, then write both parts back in place, so that views see it."""

    def write(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        target = args[0]
        pair = target if isinstance(target, ComplexPair) else as_pair(target)
        result = apply((ComplexPair(pair.re.clone(), pair.im.clone()), *args[1:]), kwargs)
        pair.re.copy_(result.re if is_pair(result) else result)
        pair.im.copy_(im(result))
        return pair

    return write


def as_pair(tensor: Tensor) -> ComplexPair:
    """The pair that stands for a real tensor from now on in this run, since a pair is about to be written into it."""
    run = _RUN.get()
    if run is None:
        raise RecordError("a complex pair was written into a real tensor outside of a run of the complex step.")
    if not tensor.is_floating_point() and not tensor.is_complex():
        raise RecordError(f"a tensor that depends on the parameters was written into one of {tensor.dtype}.")
    base = tensor._base
    if base is None:
        pair = ComplexPair(tensor, torch.zeros_like(tensor))
    else:
        whole = run.substitutes[id(base)][1] if id(base) in run.substitutes else as_pair(base)
        if not isinstance(whole, ComplexPair) or not base.is_contiguous():
            raise no_rule(Tensor.as_strided)
        offset = tensor.storage_offset() - base.storage_offset()
        pair = ComplexPair(tensor, whole.im.as_strided(tensor.size(), tensor.stride(), offset))
    run.substitutes[id(tensor)] = (tensor, pair)
    return pair


_ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _never(*_: Any) -> bool:
    return False


def _expanded(func: FunctionType) -> Rule:
    """A function written in Python: run its body on the pairs, without the question that has led here."""
    if not set(func.__code__.co_names) & set(_ASKS):
        raise no_rule(func)
    names = {**func.__globals__, **dict.fromkeys(_ASKS, _never)}
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return lambda args, kwargs: body(*args, **kwargs)
