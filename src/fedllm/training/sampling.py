"""
Which rows a batch has: more often those with much loss, each weighted so that nothing is biased.

Row i is drawn with chance p_i and counts 1 / (n p_i) times, so the expected gradient is that of all
n rows (importance sampling; Yan et al., section IV-C2, "selective data sampling").
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm.data.examples import Examples
from fedllm.training.batches import Batch

Chances = NDArray[np.float64]


def chances(losses: Tensor, floor: float) -> Chances:
    """
    The chance of each row [rows], in proportion to its last known loss [rows].

    A row without one (NaN) is taken for an average one.  floor: share of the draws that is even, so
    that no row is given up and no weight exceeds 1 / floor.
    """
    found = losses.double().numpy()
    known = found[~np.isnan(found)]
    mean = known.mean() if len(known) else 1.0
    found = np.where(np.isnan(found), mean, found)
    total = found.sum()
    even = np.full(len(found), 1 / len(found))
    return even if not total > 0 else (1 - floor) * found / total + floor * even


def weighed(batch: Batch, examples: Examples, chances: Chances) -> Batch:
    """
    The batch with a weight for each of its units, for a loss that is the mean over these.

    Predicted tokens of a text weigh alike; a text weighs as the mean of all rows' tokens would, so
    that long ones count more, as they do over all rows.
    """
    rows = np.asarray(batch.row_numbers)
    sizes = examples.targets[rows]
    of_row = len(rows) * examples.targets.mean() * len(examples) * chances[rows]
    found = np.repeat(sizes.sum() / of_row, sizes)
    return replace(
        batch, weights=torch.from_numpy(found.astype(np.float32)).to(batch.targets.device)
    )


def of_rows(batch: Batch, examples: Examples, losses: Tensor) -> dict[int, float]:
    """Row number -> loss of a row, from that of each of the batch's units [units]."""
    sizes = examples.targets[np.asarray(batch.row_numbers)]
    parts = torch.split(losses.detach().double().cpu(), sizes.tolist())
    return {int(row): float(part.sum()) for row, part in zip(batch.row_numbers, parts, strict=True)}
