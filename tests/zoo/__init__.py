"""The zoo: everything a recording must understand.

Every entry builds a fresh `Problem` in the precision asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from zoo.closures import CLOSURES
from zoo.losses import LOSSES, build_loss
from zoo.networks import NETWORKS, build_network
from zoo.problem import Problem, integers, uniform

__all__ = ["ZOO", "Problem", "integers", "uniform"]

ZOO: dict[str, Callable[[torch.dtype], Problem]] = (
    {name: partial(build_network, *entry) for name, entry in NETWORKS.items()}
    | {
        f"{name}-{reduction}": partial(build_loss, *entry, reduction)
        for name, entry in LOSSES.items()
        for reduction in ("mean", "sum", "none")
    }
    | {"kl_div-batchmean": partial(build_loss, *LOSSES["kl_div"], "batchmean")}
    | CLOSURES
)
