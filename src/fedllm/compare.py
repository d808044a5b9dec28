"""All three strategies and their bounds from one file, each in a run folder of its own."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedllm import experiment as ex
from fedllm import federation
from fedllm.errors import FedllmError
from fedllm.federation import Listener, Prepared, Silent


@dataclass(frozen=True)
class Part:
    """One run of a comparison; ``equal_steps``: its steps come from the strategies' runs."""

    name: str
    strategy: ex.Strategy
    equal_steps: bool = False


def parts(experiment: ex.Experiment) -> list[Part]:
    """What will run for each seed, strategies first."""
    spec = experiment.compare
    listed = [Part(name, getattr(spec, name)) for name in spec.strategies]
    if any(part.name == "logits" for part in listed) and not _has_public(experiment):
        raise FedllmError(
            "compare.strategies: 'logits' needs a public set; set public.size or public.source, "
            "or leave it out"
        )
    if "centralized" in spec.bounds:
        listed.append(Part("centralized", ex.Centralized()))
    if "standalone" in spec.bounds:
        listed.append(Part("standalone", ex.Standalone()))
    if "standalone-equal-steps" in spec.bounds:
        listed.append(Part("standalone-equal-steps", ex.Standalone(), True))
    if experiment.public.labelled and "logits" in spec.strategies:
        listed.append(Part("public-only", ex.Standalone(public=True)))
    return listed


def _has_public(experiment: ex.Experiment) -> bool:
    return bool(experiment.public.size or experiment.public.source)


def run(
    experiment: ex.Experiment, folder: Path, *, resume: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run every part for every seed; finished parts are not repeated. Returns the summary."""
    listener = listener or Silent()
    listed = parts(experiment)
    resolved = _same(experiment, folder, resume)
    prepared = {experiment.seeds[0]: federation.prepare(experiment, experiment.seeds[0])}
    for part in listed:  # everything that could be refused is refused before the first run
        try:
            check = experiment.replace(strategy=part.strategy)
        except ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise FedllmError(f"compare: {part.name} cannot run: {said}") from None
        federation.check(check, experiment.seeds[0], prepared[experiment.seeds[0]])
    federation.create(folder, force=resume)
    (folder / "experiment.toml").write_text(resolved)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in experiment.seeds:
        if seed not in prepared:
            prepared = {seed: federation.prepare(experiment, seed)}
        for part in listed:
            one = _resolve(part, experiment, found, prepared[seed])
            if one is None:
                summary = {**found["standalone"][-1], "same_as": "standalone"}
            else:
                name = f"{part.name}-seed{seed}" if len(experiment.seeds) > 1 else part.name
                summary = federation.run(
                    one, seed, folder / name, resume=(folder / name).exists(),
                    prepared=prepared[seed], listener=listener,
                )  # fmt: skip
            found.setdefault(part.name, []).append(summary)
    base = base_quality(experiment, prepared[experiment.seeds[-1]])
    total = joined(experiment, found, base)
    federation.write_json(folder / "summary.json", total)
    return total


def _same(experiment: ex.Experiment, folder: Path, resume: bool) -> str:
    """The experiment as text; FedllmError where a folder to be resumed holds another."""
    resolved = ex.dump(experiment)
    stored = folder / "experiment.toml"
    if resume and stored.exists():
        ex.agree(stored, experiment)
    return resolved


def _resolve(
    part: Part, experiment: ex.Experiment, found: dict[str, list[dict[str, Any]]],
    prepared: Prepared,
) -> ex.Experiment | None:  # fmt: skip
    """The part's experiment; None where equal steps are what ``standalone`` had anyway."""
    if not part.equal_steps:
        return experiment.replace(strategy=part.strategy)
    training = experiment.training
    alone = [
        math.ceil(len(data.train) / training.batch_size) * training.epochs * experiment.rounds
        for data in prepared.clients.values()
    ]
    given = [
        [int(runs[-1]["costs"].get(client, {}).get("optimizer_steps", 0))
         for client in sorted(prepared.clients)]
        for name, runs in found.items()
        if name in experiment.compare.strategies
    ]  # fmt: skip
    order = sorted(range(len(alone)), key=lambda i: list(prepared.clients)[i])
    alone = [alone[i] for i in order]
    most = [max([*column]) for column in zip(alone, *given, strict=True)]
    if most == alone and "standalone" in found:
        return None
    return experiment.replace(strategy=ex.Standalone(steps=tuple(most)))


def base_quality(experiment: ex.Experiment, prepared: Prepared) -> dict[str, Any] | None:
    """
    Quality before any training, over everybody's held-out rows (not of classification: a
    classifier's head starts at random).
    """
    if experiment.task.kind == "classification":
        return None
    return federation.untrained(experiment, experiment.seeds[-1], prepared)


def combine(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seeds of one part together: mean and standard deviation of every number."""
    first = runs[0]
    return {
        "variant": first["variant"],
        "strategy": first["strategy"],
        "headline": first["headline"],
        "same_as": first.get("same_as"),
        "metrics": spread([run["metrics"] for run in runs]),
        "clients": [run["clients"] for run in runs],
        "per_client_round": spread([run["per_client_round"] for run in runs]),
        "server_per_round": spread([_server(run) for run in runs]),
        "history": [
            [{"round": e["round"], "metrics": _plain(e.get("global") or e.get("mean"))}
             for e in run["history"]]
            for run in runs
        ],
        "flags": sorted({flag for run in runs for flag in run["flags"]}),
        "optimizer_steps": {
            client: cost["optimizer_steps"]
            for client, cost in first["costs"].items()
        },
    }  # fmt: skip


def _server(run: dict[str, Any]) -> dict[str, float]:
    cost = run["costs"].get("server", {})
    return {k: cost.get(k, 0) / run["rounds"] for k in ("flops", "seconds", "optimizer_steps")}


def _plain(metrics: dict[str, Any] | None) -> dict[str, Any] | None:
    if metrics is None:
        return None
    return {key: value for key, value in metrics.items() if not isinstance(value, dict)}


def spread(values: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{name: {"mean", "sd"}} of every number; sd is 0 for one run."""
    out = {}
    for name, value in values[0].items():
        if isinstance(value, int | float) and all(name in other for other in values):
            column = [float(v[name]) for v in values]
            sd = statistics.stdev(column) if len(column) > 1 else 0.0
            out[name] = {"mean": statistics.fmean(column), "sd": sd}
    return out


def read(folder: Path) -> dict[str, Any]:
    """The summary of a finished run or comparison. Raises FedllmError where there is none."""
    path = folder / "summary.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        raise FedllmError(
            f"{folder}: no finished run here (no readable summary.json); --resume finishes one"
        ) from None
    parts = found.get("parts", {"": found}) if isinstance(found, dict) else {"": {}}
    keys = {"name", "task", "model", "rounds"} - set(found)
    keys |= {key for part in parts.values() for key in PART if key not in part}
    if keys:
        raise FedllmError(f"{path}: not a run's summary (it lacks {', '.join(sorted(keys))})")
    return dict(found)


PART = ("variant", "strategy", "metrics", "per_client_round", "history", "flags")


def seeds(
    experiment: ex.Experiment, folder: Path, *, resume: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One strategy with several seeds: ``folder/seed-S`` each, and their mean and spread."""
    resolved = _same(experiment, folder, resume)
    federation.create(folder, force=resume)
    (folder / "experiment.toml").write_text(resolved)
    runs = []
    for seed in experiment.seeds:
        inner = folder / f"seed-{seed}"
        runs.append(
            federation.run(experiment, seed, inner, resume=inner.exists(), listener=listener)
        )
    total = joined(experiment, {experiment.strategy.kind: runs})
    federation.write_json(folder / "summary.json", total)
    return total


def joined(
    experiment: ex.Experiment, found: dict[str, list[dict[str, Any]]],
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The summary of several runs."""
    return {
        "name": experiment.name,
        "kind": "compare",
        "task": experiment.task.kind,
        "model": experiment.model.name,
        "tunables": experiment.tunables.kind,
        "seeds": list(experiment.seeds),
        "rounds": experiment.rounds,
        "parts": {name: combine(runs) for name, runs in found.items()},
        "base": base,
    }
