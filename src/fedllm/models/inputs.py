"""What a core takes: rows of one client or of many, side by side, with little or no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedllm.flat import Ints

Block = tuple[int, int]


@dataclass(frozen=True)
class Inputs:
    """
    Rows of tokens or hidden states, flat: block after block, row after row.

    x: tokens [cells], or hidden states [cells, width], where virtual tokens of a soft prompt
    stand before each row's own.  blocks: (rows, length) of each; its rows are right-padded to
    that length, virtual tokens not counted.  lengths: real tokens of each row [rows]; None: all
    rows are full.  select: cells whose token logits are wanted, virtual tokens not counted.
    slots: how many blocks belong to each client, where several train together.  at: the place of
    each cell in the row that it comes from [cells], where others of it were left out.
    """

    x: Tensor
    blocks: tuple[Block, ...]
    lengths: Tensor | None = None
    select: Tensor | None = None
    slots: tuple[int, ...] = ()
    at: Tensor | None = None

    @staticmethod
    def of(x: Tensor, lengths: Tensor | None = None, select: Tensor | None = None) -> Inputs:
        """One block: tokens [rows, length] or hidden states [rows, length, width]."""
        return Inputs(x.flatten(0, 1), ((x.shape[0], x.shape[1]),), lengths, select)

    def after(self, hidden: Tensor) -> Inputs:
        """The same rows, as hidden states [cells, width] that a part gave back."""
        return replace(self, x=hidden)

    @property
    def tokens(self) -> bool:
        """Whether x are tokens."""
        return not self.x.is_floating_point()

    @property
    def rows(self) -> int:
        """Rows in all."""
        return sum(rows for rows, _ in self.blocks)

    @property
    def cells(self) -> int:
        """Places for tokens, padding included, virtual tokens not."""
        return sum(rows * length for rows, length in self.blocks)

    @property
    def parts(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each client."""
        found, begin = [], 0
        for count in self.slots or (len(self.blocks),):
            found.append(self.blocks[begin : begin + count])
            begin += count
        return tuple(found)

    @cached_property
    def width_of_rows(self) -> Ints:
        """Padded length of each row."""
        return np.repeat([n for _, n in self.blocks], [r for r, _ in self.blocks]).astype(np.int64)

    def starts(self, extra: int = 0) -> Ints:
        """First cell of each row, with ``extra`` virtual tokens before every row."""
        ends = np.cumsum(self.width_of_rows + extra)
        return ends - self.width_of_rows - extra

    def positions(self, extra: int = 0, first: int = 0) -> Tensor:
        """Position of each cell in its row, counted from ``first``: [cells]."""
        tiles = [np.tile(np.arange(first, first + n + extra), rows) for rows, n in self.blocks]
        return torch.from_numpy(np.concatenate(tiles)).to(self.x.device)

    def real(self, extra: int = 0) -> Tensor:
        """Which cells hold real tokens (virtual ones are real): [cells]."""
        lengths = self.full_lengths() + extra
        return self.positions(extra) < lengths.repeat_interleave(
            torch.from_numpy(self.width_of_rows + extra).to(self.x.device)
        )

    def full_lengths(self) -> Tensor:
        """Real tokens of each row, whether or not all are full: [rows]."""
        if self.lengths is not None:
            return self.lengths
        return torch.from_numpy(self.width_of_rows).to(self.x.device)

    @property
    def packed(self) -> bool:
        """Whether no cell is padding."""
        return self.lengths is None


def beside(parts: Sequence[Inputs]) -> Inputs:
    """Several clients' inputs as one, a slot for each."""
    if len(parts) == 1:
        return parts[0]
    full = all(part.lengths is None for part in parts)
    selects, offset = [], 0
    for part in parts:
        if part.select is not None:
            selects.append(part.select + offset)
        offset += part.cells
    places = [part.at for part in parts if part.at is not None]
    return Inputs(
        torch.cat([part.x for part in parts]),
        tuple(block for part in parts for block in part.blocks),
        None if full else torch.cat([part.full_lengths() for part in parts]),
        torch.cat(selects) if selects else None,
        tuple(len(part.blocks) for part in parts),
        torch.cat(places) if places else None,
    )
