"""The data of a simulated federation: rows read once, divided by the run seed, tokenized once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm import experiment as ex
from fedllm.data import choices, sources
from fedllm.data.partition import by_column, dirichlet, even, iid
from fedllm.data.sources import Rows
from fedllm.errors import FedllmError
from fedllm.streams import stream


@dataclass(frozen=True)
class ClientRows:
    """One client's rows."""

    train: Rows
    validation: Rows
    test: Rows


@dataclass(frozen=True)
class Division:
    """Everybody's rows, and the labels that all agree on. ``dropped``: rows nobody got."""

    clients: dict[str, ClientRows]
    public: Rows
    labels: tuple[str, ...]
    dropped: int


def divide(experiment: ex.Experiment, columns: Sequence[str], seed: int) -> Division:
    """
    Read the sources and give each client its rows.

    Raises FedllmError for a missing column, a label that only the test rows have, more clients
    than rows, or a public set larger than the data.
    """
    sim, public = experiment.simulation, experiment.public
    rows = sources.read(sim.source, sim.format, sim.split, "simulation.source")
    needed = [*columns]
    column = sim.partition.column if isinstance(sim.partition, ex.ByColumn) else None
    _check(experiment, rows, needed, sim.source)
    if column is not None:
        sources.need(rows, [column], sim.source, "simulation.partition")
    test: Rows | None = None
    if sim.test is not None or sim.source == "builtin":
        test = sources.read(sim.test or "builtin", sim.format, "test", "simulation.test")
        _check(experiment, test, needed, sim.test or "builtin")
    outside: Rows | None = None
    if public.source is not None and public.source in (sim.source, sim.test):
        raise FedllmError(
            f"public.source = {public.source!r}: these are private rows; leave it out, and "
            "public.size rows are taken from them before the clients get theirs"
        )
    if public.source is not None:
        outside = sources.read(public.source, sim.format, sim.split, "public.source")
        hidden = experiment.task.kind == "classification" and not public.labelled
        _check(experiment, outside, needed[:1] if hidden else needed, public.source)
    labels = _labels(experiment, rows, test)
    rng = stream(seed, "partition")
    kept, shared = _cut_public(rows, outside, public, rng)
    parts = _parts(kept, sim, experiment.data.label, rng)
    tests = _tests(test, list(parts), column, sim, rng)
    shuffled = ex.whose("simulation.shuffled", sim.shuffled, list(parts))
    clients = {}
    for client, mine in parts.items():
        mine = [mine[i] for i in stream(seed, "split", client).permutation(len(mine))]
        held = tests[client] if tests else None
        if held is None:
            count = round(len(mine) * sim.test_fraction)
            held, mine = mine[:count], mine[count:]
        count = round(len(mine) * sim.validation)
        train = mine[count:]
        if client in shuffled:
            rng = stream(seed, "shuffled", client)
            train = _shuffled(train, experiment.data.label, shuffled[client], rng)
        clients[client] = ClientRows(train, mine[:count], held)
        on = experiment.evaluation.on
        for what, got in (
            ("training", clients[client].train),
            (on, getattr(clients[client], on)),
        ):
            if not got:
                raise FedllmError(
                    f"client {client!r}: no {what} rows left ({len(parts[client])} in all); "
                    "fewer clients, more rows, or other fractions in [simulation]"
                )
    given = sum(len(mine) for mine in parts.values())
    return Division(clients, shared, labels, len(kept) - given)


def _shuffled(rows: Rows, label: str, share: float, rng: np.random.Generator) -> Rows:
    """The rows, of which this share, drawn at random, have exchanged their labels."""
    chosen = rng.permutation(len(rows))[: round(len(rows) * share)]
    given = dict(zip(sorted(chosen.tolist()), chosen.tolist(), strict=True))
    return [{**row, label: rows[given.get(i, i)][label]} for i, row in enumerate(rows)]


def _check(experiment: ex.Experiment, rows: Rows, columns: Sequence[str], source: str) -> None:
    """Raise FedllmError unless the rows have the columns, and questions their answers."""
    sources.need(rows, columns, source)
    if experiment.task.kind == "multiple-choice":
        choices.need(rows, experiment.data, source)


def _labels(experiment: ex.Experiment, rows: Rows, test: Rows | None) -> tuple[str, ...]:
    if experiment.task.kind != "classification":
        return ()
    label = experiment.data.label
    known = experiment.data.labels or tuple(sorted({row[label] for row in rows}))
    for where, some in (("training rows", rows), ("test rows", test or [])):
        unknown = sorted({row[label] for row in some} - set(known))
        if unknown:
            raise FedllmError(
                f"{experiment.simulation.source}: label {unknown[0]!r} is in the {where}, but "
                f"not in {'data.labels' if experiment.data.labels else 'the training rows'} "
                f"({len(unknown)} such labels); correct the rows or list it in data.labels"
            )
    if len(known) < 2:
        raise FedllmError(f"data.label = {label!r}: only {len(known)} label; nothing to tell apart")
    return known


def _cut_public(
    rows: Rows, outside: Rows | None, public: ex.Public, rng: np.random.Generator
) -> tuple[Rows, Rows]:
    if outside is not None:
        count = public.size or len(outside)
        if count > len(outside):
            raise FedllmError(f"public.size = {count}: {public.source} has {len(outside)} rows")
        return rows, [outside[i] for i in sorted(rng.permutation(len(outside))[:count])]
    if public.size >= len(rows):
        raise FedllmError(
            f"public.size = {public.size}: the training source has only {len(rows)} rows, "
            "and the clients need some"
        )
    order = rng.permutation(len(rows))
    chosen, rest = sorted(order[: public.size]), sorted(order[public.size :])
    return [rows[i] for i in rest], [rows[i] for i in chosen]


def names(count: int) -> list[str]:
    """``client-1`` ..., padded so that the order of names is the order of numbers."""
    digits = len(str(count))
    return [f"client-{k:0{digits}d}" for k in range(1, count + 1)]


def _parts(rows: Rows, sim: ex.Simulation, label: str, rng: np.random.Generator) -> dict[str, Rows]:
    if isinstance(sim.partition, ex.ByColumn):
        column = sim.partition.column
        groups = by_column([row[column] for row in rows], sim.clients)
        found = {_safe(value): [rows[i] for i in group] for value, group in groups.items()}
        if len({name.lower() for name in found}) < len(groups):
            raise FedllmError(f"simulation.partition.column = {column!r}: two values look alike")
        if sim.examples is not None:
            found = {client: mine[: sim.examples] for client, mine in found.items()}
        return found
    sizes = list(sim.sizes) or (
        [sim.examples] * sim.clients if sim.examples else even(len(rows), sim.clients)
    )
    if sum(sizes) > len(rows) or sim.clients > len(rows):
        raise FedllmError(
            f"simulation.clients = {sim.clients}: {max(sum(sizes), sim.clients)} training rows "
            f"are asked for, and there are {len(rows)} after the public set"
        )
    if isinstance(sim.partition, ex.Dirichlet):
        if label not in rows[0]:
            raise FedllmError("simulation.partition.kind = 'dirichlet': needs a label column")
        chosen = [rows[i] for i in sorted(rng.permutation(len(rows))[: sum(sizes)])]
        groups_ = dirichlet([r[label] for r in chosen], sim.clients, sim.partition.alpha, rng)
        rows = chosen
    else:
        groups_ = iid(len(rows), sizes, rng)
    return dict(
        zip(names(sim.clients), [[rows[i] for i in group] for group in groups_], strict=True)
    )


def _safe(value: str) -> str:
    """A client's name, usable in paths and tables."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in value.strip())
    taken = name.lower() in ("server", "all", "public") or not name.strip(".")
    return f"client-{name.strip('.') or 'unnamed'}" if taken else name


def _tests(
    test: Rows | None, clients: list[str], column: str | None, sim: ex.Simulation,
    rng: np.random.Generator,
) -> dict[str, Rows] | None:  # fmt: skip
    """Each client's share of the test rows: its own by column, otherwise dealt evenly."""
    if test is None:
        return None
    order = rng.permutation(len(test))[: sim.test_examples or len(test)]
    test = [test[i] for i in sorted(order)]
    if column is not None and test and column in test[0]:
        shares: dict[str, Rows] = {client: [] for client in clients}
        for row in test:
            if _safe(row[column]) in shares:
                shares[_safe(row[column])].append(row)
        return shares
    groups = iid(len(test), even(len(test), len(clients)), rng)
    return dict(zip(clients, [[test[i] for i in group] for group in groups], strict=True))
