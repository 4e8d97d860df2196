"""What one Newton step sends, mode by mode, and how long that takes on a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MODES = ("exact", "diagonalized", "quorum", "partitioned")


@dataclass(frozen=True)
class Message:
    """`count` exchanges in which a rank puts `num_bytes` each: "sum", "gather", "first" or "ask" over `ranks` ranks.

    They are the four that `Processes` has: an all-reduce, an all-gather, a broadcast and a question to the store.
    """

    kind: str
    num_bytes: int
    count: int
    ranks: int


@dataclass(frozen=True)
class Network:
    """A network of equal links: `bandwidth` in bytes a second, `latency` of a message between two ranks in seconds.

    The algorithms are taken to be those of gloo: rings, and a binomial tree for the broadcast. With b bytes on R ranks,
    W the bandwidth and L the latency

        sum     2(R − 1)(L + b/RW)
        gather  (R − 1)(L + b/W)
        first   ⌈log₂ R⌉(L + b/W)
        ask     2L

    The latency holds all that an exchange costs without its bytes, its software, too.
    """

    bandwidth: float
    latency: float

    def seconds(self, message: Message) -> float:
        """The time of all `count` of them."""
        R, b = message.ranks, message.num_bytes / self.bandwidth
        if R == 1:
            return 0.0
        one = {
            "sum": 2 * (R - 1) * (self.latency + b / R),
            "gather": (R - 1) * (self.latency + b),
            "first": math.ceil(math.log2(R)) * (self.latency + b),
            "ask": 2 * self.latency,
        }
        return message.count * one[message.kind]


@dataclass(frozen=True)
class Step:
    """A step of `NewtonCG` or `DistributedNewton` after the first one, without weight decay.

    `num_parameters` P of `itemsize` bytes, `iterations` of CG, all ended by their limit, `evaluations` of the loss, and
    the quorum's `min_iterations`. `layers`, the sizes of a chain of linear layers, and the samples of the batch are
    for the mode "partitioned" alone.
    """

    num_parameters: int
    itemsize: int = 4
    iterations: int = 20
    evaluations: int = 1
    min_iterations: int = 2
    layers: tuple[int, ...] = ()
    num_samples: int = 0


def mesh_of(ranks: int) -> tuple[int, int]:
    """The two sizes of a mesh that are nearest to a square, the greater one first."""
    columns = next(c for c in range(math.isqrt(ranks), 0, -1) if ranks % c == 0)
    return ranks // columns, columns


def exchanges(mode: str, step: Step, ranks: int) -> list[Message]:
    """All that rank 0 sends in a step; nothing where it is alone."""
    if ranks == 1:
        return []
    if mode == "partitioned":
        return _partitioned(step, mesh_of(ranks))
    P, k = step.num_parameters * step.itemsize, step.iterations

    def messages(kind: str, num_bytes: int, count: int = 1) -> Message:
        return Message(kind, num_bytes, count, ranks)

    shared = [
        messages("gather", 32, 2 + step.evaluations),  # weights of the ranks, the loss, the loss at trial points
        messages("sum", P),  # gradient
        messages("first", 40),  # what rank 0 says of the solution
        messages("first", P),  # the solution
    ]
    if mode == "exact":
        return [*shared, messages("first", step.itemsize, 9 + 3 * k), messages("sum", P, k)]
    blocks = [
        *shared,
        messages("first", step.itemsize, 10),  # inner products
        messages("gather", 24),  # how the ranks' solves ended
        messages("gather", -(-step.num_parameters // ranks) * step.itemsize),  # their parts of d
        messages("sum", 32),  # DᵀAD of two directions
    ]
    if mode == "diagonalized":
        return blocks
    return [*blocks, messages("first", 8), messages("ask", 8, k - step.min_iterations + 2)]


def _partitioned(step: Step, mesh: tuple[int, int]) -> list[Message]:
    """The same products with the layers' messages in the place of one sum, and inner products over all ranks."""
    ranks, k = mesh[0] * mesh[1], step.iterations
    forward, backward = _of_layers(step, mesh)
    passes = 1 + k + step.evaluations, 1 + k  # gradient, products, trial points
    numbers = Message("sum", step.itemsize, 11 + 4 * k, ranks)  # inner products, tests for NaN
    found = [Message(m.kind, m.num_bytes, passes[0], m.ranks) for m in forward]
    return [*found, *(Message(m.kind, m.num_bytes, passes[1], m.ranks) for m in backward), numbers]


def _of_layers(step: Step, mesh: tuple[int, int]) -> tuple[list[Message], list[Message]]:
    """What a forward and a backward pass send: see `CutLinear`."""
    forward, backward, row = [], [], step.num_samples * step.itemsize
    for number, (inputs, outputs) in enumerate(pairwise(step.layers)):
        inner, outer = mesh[number % 2], mesh[1 - number % 2]
        forward.append(Message("sum", row * -(-outputs // outer), 1, inner))
        if number:
            backward.append(Message("sum", row * -(-inputs // inner), 1, outer))
    forward.append(Message("gather", row * -(-step.layers[-1] // outer), 1, outer))
    return [m for m in forward if m.ranks > 1], [m for m in backward if m.ranks > 1]


def total(messages: Sequence[Message]) -> tuple[int, int]:
    """Bytes and messages, as `StepReport` counts them."""
    return sum(m.num_bytes * m.count for m in messages), sum(m.count for m in messages)
