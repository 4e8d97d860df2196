"""How long a Newton step would take on many ranks: the cost model's operations and what the step sends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchnewton.costs import Costs
from torchnewton.curvature import GaussNewton
from torchnewton.curvature.cost_model import CALL, READ, gauss_newton_costs
from torchnewton.distributed.cut_layers import ELEMENTWISE
from torchnewton.record import Tape, record
from torchnewton.train.data import Dataset
from torchnewton.train.exchanges import MODES, Network, Step, exchanges, total
from torchnewton.train.loop import loss_function
from torchnewton.train.models import are_sizes, build

VECTORS = 200.0  # operations that take as long as what an iteration of CG does with one entry of its vectors
TENSORS = 0.5 * CALL  # and with one tensor, however small


@dataclass(frozen=True)
class Operations:
    """Of a step on one rank with n samples: one gradient, the products of a solve, one evaluation, one combination.

    `vectors` is what CG does beside its products, for whole vectors.
    """

    gradient: float
    products: float
    evaluation: float
    combination: float
    vectors: float


@dataclass(frozen=True)
class Row:
    """The prediction for one mode on so many ranks; seconds of computing and of exchanges."""

    mode: str
    ranks: int
    num_bytes: int
    messages: int
    computing: float
    exchanging: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.computing + self.exchanging


@dataclass
class Planner:
    """Predicts steps of `NewtonCG` and `DistributedNewton` on `num_samples` samples, cut over the ranks.

        a gradient, k products, e evaluations of the loss: by the cost model of `Auto`, with a pass over the parameters
        for each; CG's vectors; the exchanges of the mode on the network, one after another

    A rank has ⌈N/R⌉ samples and a product costs what it costs for all parameters; "diagonalized" and "quorum" have
    Krylov vectors of P/R entries and one product more, for the combination of two directions. "partitioned" has all
    samples and 1/R of every layer, with products by double backward. `slow` is how many times as long one rank's
    products take: the quorum then waits for `min_iterations` of it.

    `rate` is operations a second. Without it gradients are timed here, with as many samples as a rank has, and
    everything else is in proportion to them. Where several ranks share a machine's cores, give a rate.
    """

    model: nn.Module
    data: Dataset
    step: Step
    network: Network
    rate: float | None = None
    slow: float = 1.0
    _rates: dict[int, float] = field(default_factory=dict)
    _known: dict[tuple[int, int], Operations] = field(default_factory=dict)

    @property
    def modes(self) -> list[str]:
        """Those that the model allows."""
        return [mode for mode in MODES if mode != "partitioned" or self.step.layers]

    def row(self, mode: str, ranks: int) -> Row:
        """One prediction."""
        messages = exchanges(mode, self.step, ranks)
        num_bytes, count = total(messages)
        exchanging = sum(self.network.seconds(message) for message in messages)
        return Row(mode, ranks, num_bytes, count, self._computing(mode, ranks), exchanging)

    def _computing(self, mode: str, ranks: int) -> float:
        parts = ranks if mode == "partitioned" else 1
        work, rate = self._work(-(-self.step.num_samples // ranks), parts)
        share, slow = ranks, self.slow if ranks > 1 else 1.0
        if mode == "exact" or ranks == 1:
            share = 1
        elif mode == "quorum":
            slow = max(1.0, self.slow * self.step.min_iterations / self.step.iterations)
        extra = work.combination if mode in ("diagonalized", "quorum") else 0.0
        products = work.products if mode != "partitioned" else self.step.iterations * work.combination
        flops = work.gradient + slow * products + self.step.evaluations * work.evaluation + extra
        return (flops + work.vectors / share) / rate

    def _work(self, num_samples: int, parts: int) -> tuple[Operations, float]:
        """Operations with so many samples and a part of the parameters, and operations a second."""
        key = num_samples, parts
        if key not in self._known:
            closure = self._closure(num_samples)
            params = [p for p in self.model.parameters() if p.requires_grad]
            tape, k = record(closure, params), self.step.iterations
            self._known[key] = operations(tape, k, parts)
            if num_samples not in self._rates:
                seconds = 0.0 if self.rate else _seconds(lambda: record(closure, params))
                self._rates[num_samples] = self.rate or operations(tape, k).gradient / seconds
        return self._known[key], self._rates[num_samples]

    def _closure(self, num_samples: int) -> Callable[[], Tensor]:
        index = torch.arange(num_samples) % len(self.data.x_train)
        x, y = self.data.x_train[index], self.data.y_train[index]
        return lambda: loss_function(self.model(x), y, self.data.loss)


def operations(tape: Tape, iterations: int, parts: int = 1) -> Operations:
    """By the cost model, and a pass over this rank's part of the parameters for each matrix product with them."""
    read = READ * sum(p.numel() for p in tape.params) / parts
    double = gauss_newton_costs(tape, None, 1).product
    costs: Costs = GaussNewton(tape).costs(iterations)
    passes = 4 if costs.setup == 0 else 2
    return Operations(
        gradient=0.75 * double + 3 * read,
        products=costs.setup + iterations * (costs.product + passes * read),
        evaluation=0.25 * double + read,
        combination=double + 4 * read,
        vectors=iterations * (VECTORS * sum(p.numel() for p in tape.params) + TENSORS * len(tape.params)),
    )


def _seconds(run: Callable[[], object]) -> float:
    """The median of five times, after one that does not count."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]


def planner(
    spec: str, data: Dataset | None, step: Step, network: Network, rate: float | None, slow: float = 1.0
) -> Planner:
    """For a model of `torchnewton train` and its task, or for layer sizes as 784-1000-10, with random samples.

    The parameters and the layers of `step` are filled in.

    Raises:
        UsageError: if the model does not fit the data.
    """
    if data is None:
        spec, data = _task_of_sizes(spec, step.num_samples)
    torch.manual_seed(0)
    model = build(spec, data)
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    filled = replace(step, num_parameters=num_parameters, layers=_layers(model))
    return Planner(model, data, filled, network, rate, slow)


def is_sizes(spec: str) -> bool:
    """Whether a model is given by its layer sizes."""
    return "-" in spec and are_sizes(spec)


def _task_of_sizes(spec: str, num_samples: int) -> tuple[str, Dataset]:
    """Random samples for layers of these sizes, with ReLU between them."""
    sizes = [int(part) for part in spec.split("-")]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(min(num_samples, 4096), sizes[0], generator=generator)
    y = torch.randint(sizes[-1], (len(x),), generator=generator)
    data = Dataset(f"random-{spec}", "classification", x, y, x, y, num_classes=sizes[-1])
    hidden = "-".join(map(str, sizes[1:-1]))
    return (f"mlp:{hidden}" if hidden else "linear"), data


def _layers(model: nn.Module) -> tuple[int, ...]:
    """The sizes of a chain of linear layers with elementwise functions between them; none for any other model."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    others = [m for m in model.children() if not isinstance(m, nn.Linear) and type(m) not in ELEMENTWISE]
    is_chain = isinstance(model, nn.Sequential) and all(isinstance(m, nn.Flatten) for m in others)
    if not is_chain or not linear or any(a.out_features != b.in_features for a, b in pairwise(linear)):
        return ()
    return (linear[0].in_features, *(layer.out_features for layer in linear))
