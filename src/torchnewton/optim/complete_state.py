"""Optimizer states as `torch.distributed.checkpoint` needs them: one form before the first step and after any.

It loads into the places that the `state_dict` of the new optimizer has, wants an entry for every parameter that
requires a gradient, and leaves out those that are frozen. It knows parameters by name: an optimizer that keeps more
with its first parameter has to be made anew with the parameters in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchnewton.optim.evaluation import check_ranges

State = dict[str, Any]
_BLANK = "blank"  # the names of the entries that stand for none
_RANGES = {  # of the options of a parameter group, which mean the same in every optimizer: low ≤ value < high
    "lr": (0, math.inf),
    "rest_lr": (0, math.inf),
    "inner_lr": (0, math.inf),
    "scope": (0, math.inf),
    "scope_growth": (0, math.inf),
    "noise": (0, math.inf),
    "average": (0, 1 + 1e-12),
    "compensation": (0, math.inf),
    "decay": (0, 1),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
}


class CompleteState(Optimizer):
    """An optimizer that `copy.deepcopy` and `pickle` take as a whole; of torch's they take groups and state alone.

    Options out of their range raise `ValueError`, those of every group as well.
    """

    def __init__(self, params: Iterable[Any], defaults: State) -> None:
        self._check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: State) -> None:
        """See `torch.optim.Optimizer.add_param_group`."""
        self._check(param_group)
        super().add_param_group(param_group)

    def _check(self, options: Mapping[str, Any]) -> None:
        given = {name: options[name] for name in _RANGES if options.get(name) is not None}
        check_ranges(type(self).__name__, **{name: (value, *_RANGES[name]) for name, value in given.items()})

    def _places(self, params: Iterable[Tensor]) -> tuple[int, ...]:
        """Where these are among all parameters."""
        places = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        return tuple(places[p] for p in params)

    def __getstate__(self) -> State:
        return dict(self.__dict__)


def first_parameter(optimizer: Optimizer) -> Tensor:
    """The one whose state holds what belongs to none; a group may be empty."""
    first: Tensor = next(p for group in optimizer.param_groups for p in group["params"])
    return first


def mark_initialized(optimizer: Optimizer) -> None:
    """Keep `torch.distributed.checkpoint` from calling `step()` without a closure to find out what the state is."""
    for group in optimizer.param_groups:
        for p in group["params"][:1]:
            optimizer.state[p]  # an empty one


def completed(optimizer: Optimizer, packed: State, first: State, blank: Callable[[Tensor, State], State]) -> State:
    """A `state_dict` in which every parameter has the entries that it may have after some steps.

    `blank(parameter, group)` gives these entries where there are none yet, `first` those that the optimizer keeps with
    its first parameter, which are moved to the first one that requires a gradient.
    """
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    states = {i: dict(packed["state"].get(i, {})) for i in range(len(pairs))}
    memory = {**first, **{key: states[0].pop(key) for key in first if key in states[0]}}
    for i, (p, group) in enumerate(pairs):
        missing = {name: value for name, value in blank(p.detach(), group).items() if name not in states[i]}
        states[i].update(missing)
        states[i][_BLANK] = list(missing)
    holder = next((i for i, (p, _) in enumerate(pairs) if p.requires_grad), 0)
    states[holder].update(memory)
    return {**packed, "state": states}


def as_before(packed: State, first: Sequence[str] = ()) -> State:
    """What `completed` was made of, from a copy; `first` are the names of what belongs to the first parameter."""
    states = {i: dict(state) for i, state in packed["state"].items()}
    for state in states.values():
        for name in state.pop(_BLANK, ()):
            del state[name]
    memory = {key: state.pop(key) for state in states.values() for key in first if key in state}
    if memory:
        position = next(i for group in packed["param_groups"] for i in group["params"])
        states.setdefault(position, {}).update(memory)
    return {**packed, "state": states}
