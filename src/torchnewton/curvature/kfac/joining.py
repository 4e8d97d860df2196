"""The blocks of the samples of several processes, which need not have the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchnewton.curvature.kfac.blocks import Block
from torchnewton.curvature.shared import Shared


@dataclass(frozen=True)
class Form:
    """What processes must have in common in blocks that are added."""

    positions: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    double: bool

    @classmethod
    def of(cls, block: Block) -> Form:
        """That of a block."""
        shapes = tuple(block.left.shape), tuple(block.right.shape)
        return cls(block.positions, *shapes, block.right.dtype is torch.float64)

    def numbers(self) -> list[float]:
        """As numbers; see `_read`."""
        parts = (self.positions, self.left, self.right)
        return [float(n) for part in parts for n in (len(part), *part)] + [float(self.double)]

    def zeros(self, like: Tensor) -> Block:
        """The block of a process that has none."""
        dtype = torch.float64 if self.double else torch.float32
        left, right = (like.new_zeros(shape, dtype=dtype) for shape in (self.left, self.right))
        return Block(self.positions, left, right)


def joined(own: Sequence[Block], params: Sequence[Tensor], shared: Shared) -> list[Block]:
    """The blocks that one process with all samples would have, from those of this process.

    A layer that only some processes have used gets its block from these; the factors are weighted as if the others had
    found zero. Parameters that are not in the same blocks everywhere, or in blocks of other factors, get the diagonals
    of theirs.

    Cost: a message of two numbers, another one where blocks differ, and the factors.
    """
    forms = [list(_read(row)) for row in shared.told([n for block in own for n in Form.of(block).numbers()])]
    mixed = _mixed(forms)
    own = [part for block in own for part in (_diagonals(block, params) if Form.of(block) in mixed else [block])]
    holders: dict[Form, list[int]] = {}
    for rank, found in enumerate(forms):
        for form in found:
            for part in _diagonal_forms(form, params) if form in mixed else [form]:
                holders.setdefault(part, []).append(rank)
    mine = {Form.of(block): block for block in own}
    blocks = [mine.get(form) or form.zeros(params[0]) for form in holders]
    lefts, rights = shared.factors([b.left for b in blocks], [b.right for b in blocks], list(holders.values()))
    return [Block(b.positions, *pair) for b, *pair in zip(blocks, lefts, rights, strict=True)]


def _read(row: Sequence[float]) -> Iterator[Form]:
    """The forms that some numbers stand for."""
    rest = iter(int(n) for n in row)
    for length in rest:
        positions = tuple(next(rest) for _ in range(length))
        left = tuple(next(rest) for _ in range(next(rest)))
        right = tuple(next(rest) for _ in range(next(rest)))
        yield Form(positions, left, right, bool(next(rest)))


def _mixed(forms: Sequence[Sequence[Form]]) -> set[Form]:
    """Those that have a parameter in common with another one."""
    users: dict[int, set[Form]] = {}
    for found in forms:
        for form in found:
            for p in form.positions:
                users.setdefault(p, set()).add(form)
    return {form for using in users.values() if len(using) > 1 for form in using}


def _diagonals(block: Block, params: Sequence[Tensor]) -> list[Block]:
    """The diagonal of a block, for each of its parameters."""
    one, dtype = block.left.new_ones(1, 1, 1), block.right.dtype
    found = block.apart(block.diagonal(), params)
    return [Block((p,), one.to(dtype), entries.reshape(1, -1).to(dtype)) for p, entries in found]


def _diagonal_forms(form: Form, params: Sequence[Tensor]) -> list[Form]:
    return [Form((p,), (1, 1, 1), (1, params[p].numel()), form.double) for p in form.positions]
