"""Rows of uneven length, one after another in one array."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def cells(begins: Ints, sizes: Ints) -> Ints:
    """Places of all cells of rows that begin here and are so long, row after row: [cells]."""
    return np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
