"""What one site, or the server, of a real federation has: rows of its own, and the public set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedllm import experiment as ex
from fedllm.data import choices, sources
from fedllm.data.simulation import ClientRows, Division
from fedllm.errors import FedllmError, nearest


def division(
    experiment: ex.Experiment, columns: Sequence[str], site: ex.SiteData | None, name: str = ""
) -> Division:
    """
    The rows of the site ``name``, or the server's (without ``site``).

    columns: that private rows must have.  Raises FedllmError for missing files and columns,
    unlisted labels, and for what only a simulation can do.
    """
    labels = experiment.data.labels
    if experiment.task.kind == "classification" and not labels:
        raise FedllmError(
            "data.labels: list them all; nothing else tells several sites the same numbers"
        )
    if isinstance(experiment.strategy, ex.Centralized | ex.Standalone):
        raise FedllmError(
            f"strategy.kind = {experiment.strategy.kind!r}: a bound, which only a simulation can "
            "compute; choose 'parameters', 'logits' or 'activations'"
        )
    spec = experiment.strategy
    if getattr(spec, "cut", None) == "auto":
        raise FedllmError(
            "strategy.cut = 'auto': goes by the machines of [plan], which only a simulation has; "
            "expected a number, or a table from sites' names to numbers"
        )
    turns = {
        "strategy.client_models": ("model", getattr(spec, "client_models", ())),
        "strategy.cut": ("cut", getattr(spec, "cut", ())),
        "tunables.ranks": ("rank", getattr(experiment.tunables, "ranks", ())),
        "tunables.budgets": ("budget", getattr(experiment.tunables, "budgets", ())),
        "tunables.modules": ("part", getattr(experiment.tunables, "modules", ())),
    }
    for key, (what, listed) in turns.items():
        if isinstance(listed, tuple) and listed:
            example = {
                "model": '"NAME"', "cut": "2", "rank": "8", "budget": "100_000",
                "part": "{ layers = [-1] }",
            }[what]  # fmt: skip
            raise FedllmError(
                f"{key}: sites have no turn; expected a table that says which site has which "
                f"{what}, e.g. {{ bank-a = {example} }}"
            )
    if experiment.evaluation.on != "test":
        raise FedllmError("evaluation.on: a site has training and test rows; choose 'test'")
    clients = {}
    if site is not None:
        clients[name] = ClientRows(
            _read(experiment, site.train, site.format, "data.train", columns), [],
            _read(experiment, site.test, site.format, "data.test", columns),
        )  # fmt: skip
    return Division(clients, _public(experiment, site, columns), labels, 0)


def _read(
    experiment: ex.Experiment, source: str, kind: str, key: str, columns: Sequence[str],
    here: bool = True,
) -> sources.Rows:  # fmt: skip
    if here and not Path(source).is_file():  # a site's rows come from nowhere but its own disk
        raise FedllmError(f"{key} = {source!r}: there is no such file")
    rows = sources.read(source, kind, key=key)
    sources.need(rows, columns, source)
    if experiment.task.kind == "multiple-choice":
        choices.need(rows, experiment.data, f"{key} = {source!r}")
    label, labels = experiment.data.label, experiment.data.labels
    if experiment.task.kind == "classification" and label in columns:
        for number, row in enumerate(rows, 1):
            if row[label] not in labels:
                raise FedllmError(
                    f"{key} = {source!r}: row {number}: label {row[label]!r} is not in the "
                    f"experiment's data.labels; {nearest(row[label], labels)}"
                )
    return rows


def _public(
    experiment: ex.Experiment, site: ex.SiteData | None, columns: Sequence[str]
) -> sources.Rows:
    """The public set: the server's own file, or the site's copy of it."""
    public = experiment.public
    if not isinstance(experiment.strategy, ex.Logits):
        return []
    if site is not None and public.ship:
        return []
    source = public.source if site is None else site.public
    key = "public.source" if site is None else "data.public"
    if source is None:
        raise FedllmError(f"{key}: the logits strategy needs a public set; name its file")
    hidden = experiment.task.kind == "classification" and not public.labelled
    kind = "auto" if site is None else site.format
    return _read(
        experiment, source, kind, key, columns[:1] if hidden else columns, site is not None
    )
