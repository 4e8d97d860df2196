"""Outputs by the number of their samples: the shape in which per-sample quantities are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.curvature.shared import Shared
from torchnewton.record import Tape, Term


@dataclass(frozen=True)
class OutputGroup:
    """The outputs of one term that share a number of samples N; together M numbers a sample."""

    term: int
    members: tuple[int, ...]
    num_samples: int
    width: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """N × M from the term's outputs."""
        return torch.cat([parts[i].reshape(self.num_samples, -1) for i in self.members], dim=1)

    def add(self, joined: Tensor, parts: Sequence[Tensor]) -> None:
        """Add N × M to tensors like the term's outputs."""
        start = 0
        for i in self.members:
            size = parts[i].numel() // self.num_samples
            parts[i] += joined[:, start : start + size].reshape(parts[i].shape)
            start += size


def output_groups(tape: Tape) -> list[OutputGroup]:
    """The outputs by term and number of samples, 1 for a single number; those without samples are left out."""
    groups = []
    for number, term in enumerate(tape.terms):
        members: dict[int, list[int]] = {}
        for i, z in enumerate(term.outputs):
            if z.numel():
                members.setdefault(z.shape[0] if z.dim() else 1, []).append(i)
        for n, found in members.items():
            width = sum(term.outputs[i].numel() for i in found) // n
            groups.append(OutputGroup(number, tuple(found), n, width))
    return groups


def form_of_outputs(tape: Tape, shared: Shared) -> list[float]:
    """What processes must have in common in their outputs to draw random numbers for them together.

    The first number says whether every term has outputs.
    """
    if not shared.has_samples:
        return [1.0]
    form = [float(all(term.outputs for term in tape.terms))]
    for term in tape.terms:
        lengths = [len(z) if z.dim() else -1 for z in term.outputs]
        form.append(len(lengths))
        for z, length in zip(term.outputs, lengths, strict=True):
            form += [lengths.index(length), z.dim(), *z.shape[1:]]
    return form


def uncoupled(term: Term, group: OutputGroup) -> list[OutputGroup]:
    """The group in parts that share no loss: B has no entries between them."""
    found: list[set[int]] = [{i} for i in group.members]
    for piece in term.pieces:
        joined = {i for i in group.members if term.edges[i] in piece.edges}
        touching = [part for part in found if part & joined]
        found = [part for part in found if not part & joined] + ([set().union(*touching)] if touching else [])
    widths = {i: term.outputs[i].numel() // group.num_samples for i in group.members}
    return [
        OutputGroup(group.term, tuple(sorted(part)), group.num_samples, sum(widths[i] for i in part))
        for part in sorted(found, key=min)
    ]
