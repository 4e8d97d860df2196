"""Recurrent cells and layers, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchnewton.curvature.complex_step.pair import rule

Cell = Callable[[Any, Any, Sequence[Any]], Any]  # (gates of the input, state, weights of the hidden state) → state


def _lstm(x: Any, state: Any, weights: Sequence[Any]) -> Any:
    h, c = state
    i, f, g, o = (x + F.linear(h, *weights[:2])).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (F.linear(h, weights[2]) if len(weights) > 2 else h), c


def _gru(x: Any, h: Any, weights: Sequence[Any]) -> Any:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), F.linear(h, *weights[:2]).chunk(3, -1)
    n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    z = torch.sigmoid(xz + hz)
    return n + z * (h - n)


def _tanh(x: Any, h: Any, weights: Sequence[Any]) -> Any:
    return torch.tanh(x + F.linear(h, *weights[:2]))


def _relu(x: Any, h: Any, weights: Sequence[Any]) -> Any:
    return torch.relu(x + F.linear(h, *weights[:2]))


def _output(state: Any) -> Any:
    return state[0] if isinstance(state, tuple) else state


def _chosen(mask: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, tuple):
        return tuple(torch.where(mask, a, b) for a, b in zip(new, old, strict=True))
    return torch.where(mask, new, old)


def direction(cell: Cell, x: Any, state: Any, weights: Sequence[Any], backward: bool, alive: Tensor | None) -> Any:
    """One layer in one direction over x of shape (T, N, D): all outputs and the last state.

    `alive` (T, N, 1) marks the steps that belong to a sequence; the state stands still at the others.
    """
    biases = len(weights) >= 4
    inner = [weights[1], weights[3] if biases else None, *weights[4 if biases else 2 :]]
    gates = F.linear(x, weights[0], weights[2] if biases else None)
    steps = range(x.shape[0])[::-1] if backward else range(x.shape[0])
    outputs: dict[int, Any] = {}
    for t in steps:
        new = cell(gates[t], state, inner)
        state = new if alive is None else _chosen(alive[t], new, state)
        outputs[t] = _output(state)
    return torch.stack([outputs[t] for t in range(x.shape[0])]), state


def layers(
    cell: Cell, x: Any, states: list[Any], weights: Sequence[Any], dropout: float, train: bool, directions: int,
    alive: Tensor | None = None,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """All layers; dropout between them, drawn as the compiled layers draw it."""
    size = len(weights) // len(states)
    last = []
    for start in range(0, len(states), directions):
        found = [
            direction(cell, x, states[start + d], weights[(start + d) * size : (start + d + 1) * size], d == 1, alive)
            for d in range(directions)
        ]
        x = torch.cat([y for y, _ in found], -1) if directions > 1 else found[0][0]
        last += [state for _, state in found]
        if dropout and train and start + directions < len(states):
            x = torch.dropout(x, dropout, True)
    return x, last


def _recurrent(name: str, cell: Cell) -> None:
    def run(*args: Any) -> Any:
        packed = isinstance(args[3], (list, tuple))  # (data, batch_sizes, hx, weights, …) or (input, hx, weights, …)
        if packed:
            data, sizes, hx, weights, _, _, dropout, train, bidirectional = args
            x, alive = _unpacked(data, sizes)
        else:
            x, hx, weights, _, _, dropout, train, bidirectional, batch_first = args
            x, alive = (x.transpose(0, 1) if batch_first else x), None
        parts = list(hx) if isinstance(hx, (list, tuple)) else [hx]
        states = list(zip(*(part.unbind(0) for part in parts), strict=True)) if len(parts) > 1 else parts[0].unbind(0)
        y, last = layers(cell, x, list(states), weights, dropout, train, 2 if bidirectional else 1, alive)
        finals = (
            [torch.stack(list(part)) for part in zip(*last, strict=True)] if len(parts) > 1 else [torch.stack(last)]
        )
        if packed:
            y = torch.cat([y[t, : int(n)] for t, n in enumerate(sizes)])
        elif batch_first:
            y = y.transpose(0, 1)
        return (y, *finals)

    rule(name)(run)


def _unpacked(data: Any, sizes: Tensor) -> tuple[Any, Tensor]:
    """The steps of packed sequences as (T, N, D), zeros behind the end of each, and which steps are alive."""
    full, rows, start = int(sizes[0]), [], 0
    for n in sizes.tolist():
        rows.append(F.pad(data[start : start + n], (0, 0, 0, full - n)))
        start += n
    alive = torch.arange(full)[None] < sizes[:, None]
    return torch.stack(rows), alive.unsqueeze(-1).to(data.device)


def _cell(name: str, cell: Cell) -> None:
    def run(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = tuple(hx) if isinstance(hx, (list, tuple)) else hx
        return cell(F.linear(input, w_ih, b_ih), state, [w_hh, b_hh])

    rule(name)(run)


for _name, _step in (("lstm", _lstm), ("gru", _gru), ("rnn_tanh", _tanh), ("rnn_relu", _relu)):
    _recurrent(_name, _step)
    _cell(f"{_name}_cell", _step)
