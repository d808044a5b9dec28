"""Hidden states of the blocks below the first tunable one: they never change, so they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedllm.flat import Ints, cells


@dataclass(frozen=True)
class Known:
    """
    Hidden states of some rows, one after another, without padding.

    states: [tokens, width].  ends: where each row ends.  rows: which of them a set consists of;
    None: all, in their order.  flops, seconds, peak_memory (bytes): what it took to find out.
    """

    states: Tensor
    ends: Ints
    rows: Ints | None = None
    flops: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the hidden states."""
        return self.states.numel() * self.states.element_size()

    def take(self, rows: Ints) -> Known:
        """Some of the rows; nothing is copied."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def padded(self, rows: Sequence[int], length: int) -> Tensor:
        """These rows side by side, padded with zeros: [rows * length, width]."""
        which = np.asarray(rows) if self.rows is None else self.rows[list(rows)]
        ends = self.ends[which]
        begins = np.where(which > 0, self.ends[which - 1], 0)
        sizes = ends - begins
        source = torch.from_numpy(cells(begins, sizes)).to(self.states.device)
        found = self.states[source]
        if bool((sizes == length).all()):
            return found
        target = torch.from_numpy(cells(np.arange(len(rows)) * length, sizes))
        whole = found.new_zeros((len(rows) * length, found.shape[-1]))
        whole[target.to(found.device)] = found
        return whole


@dataclass
class Frozen:
    """
    What is remembered of one model.

    begin: blocks below it are run once for each row.  wanted: which sets, by the hash of their
    tokens; of others nothing is remembered.  rows: of one pass.  sets: what is known so far, by
    hash and number of blocks.
    """

    begin: int = 0
    wanted: frozenset[str] = frozenset()
    rows: int = 1
    sets: dict[tuple[str, int], Known] = field(default_factory=dict)
