"""Between two models with different tokenizers: what one says of public rows, for the other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedllm.data.examples import Examples
from fedllm.flat import Ints, cells
from fedllm.knowledge.alignment import Bridge, bridge, carry
from fedllm.knowledge.topk import TopK
from fedllm.knowledge.vocabulary import vocabulary_map


@dataclass(frozen=True, eq=False)
class Interpreter:
    """
    Carries top-k knowledge of some rows of a public set from a source to a target tokenizer.

    spoken, heard: units of each row in the source's and in the target's tokens.  outputs: of the
    source, whose knowledge it is that comes in.
    """

    way: Bridge
    spoken: Ints
    heard: Ints
    outputs: int

    def units(self, rows: Ints) -> int:
        """Units of these rows as the source says them."""
        return int(self.spoken[rows].sum())

    def __call__(self, known: Mapping[str, Tensor], rows: Ints) -> dict[str, Tensor]:
        """
        The source's knowledge of these rows -> the target's; what is said of rows stays.

        Raises FedllmError as ``alignment.carry`` does.
        """
        mine = cells(np.cumsum(self.spoken)[rows] - self.spoken[rows], self.spoken[rows])
        theirs = cells(np.cumsum(self.heard)[rows] - self.heard[rows], self.heard[rows])
        local = np.full(int(self.spoken.sum()) + 1, -1, np.int64)  # the last one is that of -1
        local[mine] = np.arange(len(mine))
        found = carry(
            TopK(known["index"], known["value"]), local[self.way.units[theirs]], self.way.map,
            self.way.own[theirs], self.way.outputs,
        )  # fmt: skip
        return {**known, "index": found.index, "value": found.value}


def cache() -> Path | None:
    """Where vocabulary maps are kept: FEDLLM_CACHE, else the user's cache; None: nowhere."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedllm"
    folder = Path(os.environ.get("FEDLLM_CACHE") or base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def interpreter(
    source: tuple[Any, Examples, int], target: tuple[Any, Examples, int], cache: Path | None = None
) -> Interpreter:
    """
    From one side's (tokenizer, public set in its tokens, outputs of its model) to the other's.

    cache: where vocabulary maps are kept.  Raises FedllmError as ``alignment.bridge`` does.
    """
    table = vocabulary_map(source[0], target[0], cache)
    way = bridge(source[0], target[0], source[1], target[1], table, target[2])
    return Interpreter(way, source[1].targets, target[1].targets, source[2])
