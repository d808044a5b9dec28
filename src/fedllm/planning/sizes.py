"""How much data everybody has: what ``[plan]`` says of it, else what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedllm import experiment as ex
from fedllm import federation
from fedllm.costs import ClientSize
from fedllm.data.examples import Examples, most_tokens
from fedllm.data.simulation import names
from fedllm.errors import FedllmError
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


def sizes(experiment: ex.Experiment) -> Sizes:
    """
    What ``[plan]`` says of the data; what it leaves out is measured.

    Raises FedllmError for whatever a run would refuse of its data.
    """
    spec, longest = experiment.plan, limit(experiment)
    for key, many in (("tokens", spec.tokens), ("public_tokens", spec.public_tokens)):
        if many and many > longest:
            raise FedllmError(
                f"plan.{key} = {many:g}: a row has at most {longest} tokens (data.max_tokens)"
            )
    labels = spec.labels or len(experiment.data.labels)
    told = spec.tokens is not None and (
        spec.rows is not None or (bool(spec.sites) and all(site.rows for site in spec.sites))
    )
    named = spec.public_rows is not None or experiment.public.size or not experiment.public.source
    if told and named and (labels or experiment.task.kind != "classification"):
        return _described(experiment, labels, None)
    prepared = federation.prepare(experiment, experiment.seeds[0])
    labels = labels or len(prepared.labels)
    if spec.rows is not None or spec.tokens is not None or any(s.rows for s in spec.sites):
        return _described(experiment, labels, prepared)
    sites = [site for site in _sites(experiment) for _ in range(site.count)]
    crowds = tuple(
        Crowd(name, name, 1, Rows.of(data.train), data.test.tokens, site)
        for (name, data), site in zip(prepared.clients.items(), sites, strict=True)
    )
    rows = Rows.of(prepared.clients.train).size
    public = _public(experiment, Rows.of(prepared.public), rows.tokens / rows.rows)
    listed = tuple(prepared.clients)
    return Sizes(crowds, listed, public, labels, prepared.longest, prepared.notes)


def _sites(experiment: ex.Experiment) -> tuple[ex.PlanSite, ...]:
    return experiment.plan.sites or (ex.PlanSite(count=experiment.simulation.clients),)


def _described(
    experiment: ex.Experiment, labels: int, prepared: federation.Prepared | None
) -> Sizes:
    """Everybody with the same means: those of ``[plan]``, else of the data."""
    spec = experiment.plan
    read = None if prepared is None else Rows.of(prepared.clients.train).size
    tokens, mean = spec.tokens, 0.0
    if read is not None:
        tokens = tokens or read.tokens / read.rows
        mean = read.rows / experiment.simulation.clients
    assert tokens is not None
    if spec.targets and spec.targets > tokens:
        raise FedllmError(
            f"plan.targets = {spec.targets:g}: a row has {tokens:g} tokens, and no more are "
            "predicted"
        )
    per_row = 1.0 if experiment.task.kind == "classification" else (
        spec.targets or (read.units / read.rows if read else max(tokens - 1, 1))
    )  # fmt: skip
    listed, rows = tuple(names(experiment.simulation.clients)), spec.rows or round(mean)
    crowds = tuple(
        Crowd(name, listed[0], site.count,
              Rows.alike(site.rows or rows, tokens, min(per_row, tokens)), 0, site)
        for name, site in zip(spec.names, _sites(experiment), strict=True)
    )  # fmt: skip
    known = Rows.of(prepared.public) if prepared else Rows.alike(
        experiment.public.size, tokens, _shown(experiment, tokens)
    )  # fmt: skip
    return Sizes(crowds, listed, _public(experiment, known, tokens), labels, limit(experiment))


def limit(experiment: ex.Experiment) -> int:
    """Tokens of a row at most. Raises FedllmError where a run would."""
    return most_tokens(experiment.data, federation.positions(experiment))


def _public(experiment: ex.Experiment, known: Rows, tokens: float) -> Rows:
    """The public rows, as ``[plan]`` has them or as they are; tokens: where neither says so."""
    spec = experiment.plan
    count = len(known.lengths) if spec.public_rows is None else spec.public_rows
    if spec.public_tokens is None and (len(known.lengths) or not count):
        return known.resized(count)
    mean = spec.public_tokens or tokens
    return Rows.alike(count, mean, _shown(experiment, mean))


def _shown(experiment: ex.Experiment, tokens: float) -> float:
    """Predicted units of a public row: its class, or every token but the first."""
    return 1.0 if experiment.task.kind == "classification" else max(tokens - 1, 1)


def anew(experiment: ex.Experiment, data: Sizes) -> Sizes:
    """
    The same data where the tunables take another number of the model's positions.

    They are read again where that cuts rows off, or lets go of some that were cut.
    """
    longest = limit(experiment)
    rows = [data.public, *(crowd.train for crowd in data.crowds)]
    most = max(int(some.lengths.max(initial=0)) for some in rows)
    if longest != data.longest and most >= min(longest, data.longest):
        return sizes(experiment)
    return replace(data, longest=longest)
