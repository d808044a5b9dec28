"""Batches with little or no padding, in an order drawn from the client's own stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.data.examples import Examples
from fedllm.flat import Ints, cells
from fedllm.models.frozen import Known
from fedllm.models.inputs import Inputs

Padding = Literal["bucket", "longest", "fixed"]
CHUNK = 32  # batches whose rows are sorted by length together; more: less padding, less mixing


@dataclass(frozen=True)
class Batch:
    """
    Rows of one client, and what is to be learnt from them.

    targets: classes [rows] or next tokens [selected].  places: index of each target among all
    targets of the Examples, in their order.  tokens: real ones.  row_numbers: in the Examples.
    pairs: of responses, of which one is preferred; 0: there are none.
    weights: of each unit in the loss; None: all alike.
    """

    inputs: Inputs
    targets: Tensor
    places: Tensor
    tokens: int
    row_numbers: Sequence[int] = ()
    pairs: int = 0
    weights: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.inputs.rows

    @property
    def selected(self) -> int:
        """Number of token logits, 0 for classification."""
        return 0 if self.inputs.select is None else len(self.inputs.select)

    @property
    def units(self) -> int:
        """What is predicted: rows, or tokens."""
        return len(self.targets)

    @property
    def averaged(self) -> int:
        """What the loss averages over: pairs, else the units."""
        return self.pairs or self.units


def order(
    lengths: Sequence[int] | Ints,
    size: int,
    padding: Padding,
    rng: np.random.Generator | None,
) -> list[list[int]]:
    """
    Row numbers of each batch of one epoch; without ``rng`` sorted by length, for evaluation.

    ``bucket`` shuffles, sorts by length within chunks of 32 batches, and shuffles the batches:
    membership and order change every epoch; rows of very different length rarely meet.
    """
    rows = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    length = np.asarray(lengths)
    if rng is None:
        rows = rows[np.argsort(length[rows], kind="stable")]
    elif padding == "bucket":
        chunks = np.split(rows, range(CHUNK * size, len(rows), CHUNK * size))
        rows = np.concatenate([c[np.argsort(length[c], kind="stable")] for c in chunks])
    batches = [rows[i : i + size].tolist() for i in range(0, len(rows), size)]
    if rng is not None and padding == "bucket":
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches


def collate(
    examples: Examples, rows: Sequence[int], pad_to: int | None = None, device: str = "cpu",
    known: Known | None = None,
) -> Batch:  # fmt: skip
    """
    Put rows of the examples side by side, padded to the longest or to ``pad_to``.

    known: their hidden states, which then stand in place of the tokens.
    """
    which = np.asarray(rows, np.int64)
    lengths = examples.lengths[which]
    length = max(int(lengths.max()), pad_to or 0)
    begins = np.arange(len(rows)) * length
    x = np.zeros(len(rows) * length, np.int64)
    source = cells(examples.ends[which] - lengths, lengths)
    x[cells(begins, lengths)] = examples.flat[source]
    full = bool((lengths == length).all())
    if len(examples.labels):
        select = None
        targets, places = examples.labels[which], which
    else:
        sizes = examples.targets[which]
        select = cells(begins + examples.start[which] - 1, sizes)
        targets = x[select + 1]
        places = cells(np.cumsum(examples.targets)[which] - sizes, sizes)
    inputs = Inputs(
        torch.from_numpy(x).to(device) if known is None else known.padded(rows, length),
        ((len(rows), length),),
        None if full else torch.from_numpy(lengths).to(device),
        None if select is None else torch.from_numpy(select).to(device),
    )
    return Batch(
        inputs,
        targets=torch.from_numpy(targets).to(device),
        places=torch.from_numpy(places).to(device),
        tokens=int(lengths.sum()),
        row_numbers=rows,
        pairs=int((examples.option[which] == 0).sum()) if len(examples.option) else 0,
    )


def batches(
    examples: Examples, size: int, padding: Padding, rng: np.random.Generator | None,
    longest: int, device: str = "cpu", known: Known | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """One epoch of batches; ``longest`` is what ``fixed`` pads to."""
    for rows in order(examples.lengths, size, padding, rng):
        yield collate(examples, rows, longest if padding == "fixed" else None, device, known)
