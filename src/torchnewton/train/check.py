"""A pre-flight: are the derivatives of this task and model right, and what will a step cost?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchnewton import vectors
from torchnewton.curvature import (
    Autodiff,
    ComplexStep,
    FiniteDifference,
    GaussNewton,
    Hessian,
    Jacobian,
    LayerJacobian,
)
from torchnewton.curvature.directional import Backend
from torchnewton.record import Closure, RecordError, Tape, record
from torchnewton.train.loop import Run, loss_function, next_batch, train_step
from torchnewton.vectors import Vector

EXACT = 1e-9  # relative, in float64: what two exact ways may differ by
DIFFERENCE = 1e-4  # what a difference of gradients may differ by
LENGTH = 1e-7  # of the step between its ends: short, so that few kinks of ReLU or max-pooling lie between them
STEPS = 3  # that are timed
PROBES = 3  # random directions
_BACKENDS: dict[str, Backend] = {
    "complex step": ComplexStep(),
    "autograd": Autodiff(),
    "difference": FiniteDifference(LENGTH),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; `passed` is None where there is nothing to pass."""

    name: str
    value: str
    passed: bool | None = None


@dataclass(frozen=True)
class Subject:
    """The loss of one batch on a copy of the model in float64, and random directions."""

    closure: Closure
    params: list[Tensor]
    directions: list[Vector]


def check(run: Run) -> Iterator[Row]:
    """The rows of a pre-flight, as they are found. It ends with a few steps: `run` is used up."""
    x, y = next_batch(run)
    subject = _in_float64(run.model, x, y, run.data.loss)
    for part in (_determinism, _slopes, _products, _gauss_newton, _layers):
        yield from _guarded(part, subject)
    yield from _costs(run, x, y)


def _guarded(part: Callable[[Subject], Iterator[Row]], subject: Subject) -> Iterator[Row]:
    """The rows of a part; where a recording is refused, its reason."""
    try:
        yield from part(subject)
    except RecordError as error:
        yield Row(part.__name__.strip("_").replace("_", " "), str(error).split("\n")[0], False)


def _in_float64(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> Subject:
    exact = copy.deepcopy(model).double()
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    params: list[Tensor] = [p for p in exact.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    directions = [
        [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params] for _ in range(PROBES)
    ]
    return Subject(lambda: loss_function(exact(x), y, kind), params, directions)


def _recorded(subject: Subject) -> Tape:
    """A recording on the same random numbers each time."""
    torch.manual_seed(0)
    return record(subject.closure, subject.params)


def _determinism(subject: Subject) -> Iterator[Row]:
    """The closure twice on the same random numbers, and on others."""
    tapes = [_recorded(subject), _recorded(subject)]
    same = float(tapes[0].loss) == float(tapes[1].loss)
    gap = _gap(tapes[0].gradient, tapes[1].gradient)
    yield Row("the closure gives the same loss and gradient again", "yes" if same and gap == 0 else f"{gap:.1e}", same)
    random = tapes[0].random_state is not None
    yield Row("it draws random numbers", "yes, fixed within a step" if random else "no")


def _slopes(subject: Subject) -> Iterator[Row]:
    """gᵀv by every backend."""
    v = subject.directions[0]
    found = {name: backend.slope(subject.closure, subject.params, v) for name, backend in _reset(_BACKENDS)}
    scale = vectors.norm(_recorded(subject).gradient) * vectors.norm(v) or 1.0  # the gradient may be 0
    for name in ("complex step", "difference"):
        error = abs(found[name] - found["autograd"]) / scale
        yield _compared(f"gᵀv: {name} and autograd", error, EXACT if name == "complex step" else DIFFERENCE)


def _products(subject: Subject) -> Iterator[Row]:
    """Hv by every backend, and the symmetry of H."""
    u, v = subject.directions[:2]
    found = {name: backend.product(subject.closure, subject.params, v) for name, backend in _reset(_BACKENDS)}
    exact = found["autograd"]
    yield _compared("Hv: complex step and autograd", _gap(found["complex step"], exact), EXACT)
    error, name = _gap(found["difference"], exact), "Hv: difference and autograd"
    if error > DIFFERENCE and _has_kinks(subject, v, found["difference"]):
        yield Row(name, f"{error:.1e}: a kink lies between the ends of the difference, which says nothing")
    else:
        yield _compared(name, error, DIFFERENCE)
    H = Hessian(_recorded(subject))
    asymmetry = abs(vectors.dot(u, found["autograd"]) - vectors.dot(v, H @ u))
    scale = vectors.norm(u) * vectors.norm(found["autograd"]) or 1.0
    yield _compared("H is symmetric", asymmetry / scale, EXACT)


def _has_kinks(subject: Subject, v: Vector, difference: Vector) -> bool:
    """Whether a difference of half the length is another one: then f is not smooth between the ends."""
    torch.manual_seed(0)
    shorter = FiniteDifference(LENGTH / 2).product(subject.closure, subject.params, v)
    return _gap(shorter, difference) > DIFFERENCE / 10


def _gauss_newton(subject: Subject) -> Iterator[Row]:
    """Both paths of the Jacobian, symmetry, and the sign of vᵀGv."""
    tape = _recorded(subject)
    G = GaussNewton(tape, Jacobian(tape))
    products = [G @ v for v in subject.directions]
    explicit = GaussNewton(tape, LayerJacobian(tape)) @ subject.directions[0]
    yield _compared("Gv: layer factors and autograd", _gap(explicit, products[0]), EXACT)
    u, v = subject.directions[:2]
    asymmetry = abs(vectors.dot(u, products[1]) - vectors.dot(v, products[0]))
    yield _compared("G is symmetric", asymmetry / (vectors.norm(u) * vectors.norm(products[1]) or 1.0), EXACT)
    quotients = [vectors.dot(v, y) / vectors.dot(v, v) for v, y in zip(subject.directions, products, strict=True)]
    scale = max(abs(q) for q in quotients)
    yield Row("G is positive semidefinite", f"least vᵀGv/vᵀv {min(quotients):.2e}", min(quotients) >= -EXACT * scale)


def _layers(subject: Subject) -> Iterator[Row]:
    """What share of the parameters has explicit layer factors."""
    jacobian = LayerJacobian(_recorded(subject))
    layers = f"{len(jacobian.layers)} layers, {jacobian.coverage:.0%} of the parameters"
    yield Row("explicit layer factors", layers if jacobian.layers else "none: products by double backward")


def _costs(run: Run, x: Tensor, y: Tensor) -> Iterator[Row]:
    """Memory from what the graph keeps, time from a few steps on a copy."""
    params = [p for p in run.model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in params)

    def gradient() -> Any:
        return torch.autograd.grad(loss_function(run.model(x), y, run.data.loss), params, allow_unused=True)

    graph = _graph_bytes(lambda: loss_function(run.model(x), y, run.data.loss))
    count = f"{vectors.num_entries(params):,} parameters, batch {len(x)}"
    yield Row("size", count)
    yield Row("memory of the parameters", _bytes(size))
    yield Row("memory of the graph", f"{_bytes(graph)}, with second derivatives about {_bytes(2 * graph)}")
    gradient()
    seconds = min(_seconds(gradient) for _ in range(STEPS))
    yield Row("time of a gradient", f"{1e3 * seconds:.3g} ms")
    times = sorted(_seconds(lambda: train_step(run)) for _ in range(STEPS))
    step = times[STEPS // 2]
    steps = f"{1e3 * step:.3g} ms, {step / seconds:.3g} gradients"
    yield Row("time of a step", steps)
    yield Row("time of a pass over the data", f"{step * run.batches_per_epoch:.3g} s in {run.batches_per_epoch} steps")
    yield Row("loss after the steps is a number", f"{run.loss:.4g}", bool(torch.isfinite(torch.tensor(run.loss))))


def _reset(backends: dict[str, Backend]) -> Iterator[tuple[str, Backend]]:
    for item in backends.items():
        torch.manual_seed(0)
        yield item


def _compared(name: str, error: float, limit: float) -> Row:
    return Row(name, f"{error:.1e}, allowed {limit:.0e}", error <= limit)


def _gap(x: Vector, y: Vector) -> float:
    """‖x − y‖/‖y‖."""
    size = vectors.norm(y)
    return vectors.norm(vectors.add(x, y, -1.0)) / size if size else vectors.norm(x)


def _graph_bytes(loss: Callable[[], Tensor]) -> int:
    """What the graph of a forward pass keeps."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(seen.values())


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
