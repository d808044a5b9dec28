"""How much data everybody has: what ``[plan]`` says of it, else what there is."""

from __future__ import annotations

from dataclasses import replace

from fedllm import experiment as ex
from fedllm import federation
from fedllm.data.examples import most_tokens
from fedllm.data.simulation import names
from fedllm.errors import FedllmError
from fedllm.estimates.sizes import Crowd, Rows, Sizes, crowds, sites


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
    rows = Rows.of(prepared.clients.train).size
    public = _public(experiment, Rows.of(prepared.public), rows.tokens / rows.rows)
    everybody, listed = crowds(experiment, prepared.clients), tuple(prepared.clients)
    return Sizes(everybody, listed, public, labels, prepared.longest, prepared.notes)


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
    everybody = tuple(
        Crowd(name, listed[0], site.count,
              Rows.alike(site.rows or rows, tokens, min(per_row, tokens)), 0, site)
        for name, site in zip(spec.names, sites(experiment), strict=True)
    )  # fmt: skip
    known = Rows.of(prepared.public) if prepared else Rows.alike(
        experiment.public.size, tokens, _shown(experiment, tokens)
    )  # fmt: skip
    public = _public(experiment, known, tokens)
    return Sizes(everybody, listed, public, labels, limit(experiment))


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
