"""How much data everybody has, as rows, batches and crowds of clients that are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedllm import experiment as ex
from fedllm.costs import ClientSize
from fedllm.data.clients import ClientData
from fedllm.data.examples import Examples
from fedllm.flat import Ints


@dataclass(frozen=True)
class Rows:
    """Some rows: tokens and predicted units of each."""

    lengths: Ints
    targets: Ints

    @staticmethod
    def of(examples: Examples | None) -> Rows:
        """Those of a tokenized set."""
        if examples is None:
            return Rows.alike(0, 1, 1)
        return Rows(examples.lengths, examples.targets)

    @staticmethod
    def alike(count: int, tokens: float, targets: float) -> Rows:
        """So many rows with these means."""
        return Rows(_spread(count, tokens), _spread(count, targets))

    @property
    def size(self) -> ClientSize:
        """What byte formulas take."""
        return ClientSize(len(self.lengths), int(self.lengths.sum()), int(self.targets.sum()))

    def resized(self, count: int) -> Rows:
        """So many, spread evenly over these sorted by length."""
        there = len(self.lengths)
        if count == there:
            return self
        places = (np.arange(count) + 0.5) * there / count
        which = np.argsort(self.lengths, kind="stable")[places.astype(np.int64)]
        return Rows(self.lengths[which], self.targets[which])


def _spread(count: int, mean: float) -> Ints:
    """Whole numbers with this mean, as near to each other as can be."""
    ends = np.round(np.arange(count + 1) * mean).astype(np.int64)
    return np.maximum(np.diff(ends), 1)


@dataclass(frozen=True)
class Batches:
    """Rows, padded length, tokens and predicted units of some batches."""

    rows: Ints
    lengths: Ints
    tokens: Ints
    units: Ints

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def of(rows: Rows, groups: Sequence[Sequence[int]], pad_to: int | None = None) -> Batches:
        """Those that hold these row numbers."""
        starts = np.cumsum([0, *map(len, groups)])[:-1]
        flat = np.concatenate([np.asarray(g, np.int64) for g in groups])
        lengths, targets = rows.lengths[flat], rows.targets[flat]
        longest = np.maximum.reduceat(lengths, starts)
        return Batches(
            np.array([len(g) for g in groups], np.int64), np.maximum(longest, pad_to or 0),
            np.add.reduceat(lengths, starts), np.add.reduceat(targets, starts),
        )  # fmt: skip

    @staticmethod
    def joined(parts: Sequence[Batches]) -> Batches:
        """All of them."""
        none = np.zeros(0, np.int64)
        columns = ("rows", "lengths", "tokens", "units")
        return Batches(*(np.concatenate([none, *(getattr(p, c) for p in parts)]) for c in columns))

    def largest(self) -> list[Shape]:
        """The shapes among which the one that takes most memory is."""
        cells = self.rows * self.lengths
        found = {int(cells.argmax())}
        if bool((self.units != self.rows).any()):  # token logits, which may weigh more
            found.add(int(self.units.argmax()))
        return [
            Shape(int(self.rows[i]), int(self.lengths[i]), int(self.tokens[i]) == int(cells[i]),
                  int(self.units[i]))
            for i in sorted(found)
        ]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One batch: rows, their padded length, whether none is padded, predicted units."""

    rows: int
    length: int
    full: bool
    units: int


@dataclass(frozen=True, eq=False)
class Crowd:
    """
    Clients that are alike: how many, their rows, tokens held out, and their machines.

    name: what a plan calls them.  client: what one of them is called in frames.
    """

    name: str
    client: str
    count: int
    train: Rows
    held_out: int
    site: ex.PlanSite


@dataclass(frozen=True)
class Sizes:
    """
    Everybody's rows, the clients' names in the order of the crowds, and the rows that are public;
    labels; the longest row there may be.

    refused: why nothing can run with these.
    """

    crowds: tuple[Crowd, ...]
    names: tuple[str, ...]
    public: Rows
    labels: int
    longest: int
    notes: tuple[str, ...] = ()
    refused: str = ""

    @cached_property
    def few(self) -> bool:
        """Whether rows have two lengths at most."""
        found = [np.unique(rows.lengths) for rows in (self.public, *(c.train for c in self.crowds))]
        return len(np.unique(np.concatenate(found))) < 3

    @cached_property
    def clients(self) -> int:
        """How many there are."""
        return sum(crowd.count for crowd in self.crowds)


def sites(experiment: ex.Experiment) -> tuple[ex.PlanSite, ...]:
    """The machines of ``[plan]``; without any, one kind for all clients."""
    return experiment.plan.sites or (ex.PlanSite(count=experiment.simulation.clients),)


def crowds(experiment: ex.Experiment, clients: Mapping[str, ClientData]) -> tuple[Crowd, ...]:
    """A crowd of one for each of these clients."""
    each = [site for site in sites(experiment) for _ in range(site.count)]
    return tuple(
        Crowd(name, name, 1, Rows.of(data.train), data.test.tokens, site)
        for (name, data), site in zip(clients.items(), each, strict=True)
    )
