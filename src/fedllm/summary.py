"""What a run achieved and cost, from its ledger and history."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from fedllm import experiment as ex
from fedllm.ledger import Row


class Notes(Protocol):
    """Anything with notes to carry into the summary."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences."""
        ...


def variant(experiment: ex.Experiment) -> str:
    """The strategy with what distinguishes it, e.g. ``activations (sequential, cut 2)``."""
    spec = experiment.strategy
    if isinstance(spec, ex.Activations):
        listed = [spec.cut] if isinstance(spec.cut, int | str) else spec.cut
        named = listed.items() if isinstance(listed, dict) else [("", cut) for cut in listed]
        cut = ", ".join(f"{name} {cut or 'half'}".strip() for name, cut in named)
        home = ", labels at the client" if spec.labels == "client" else ""
        share = f"{spec.keep_tokens:.0%} of the tokens by {spec.keep_by}"
        thin = f", {share}" if spec.keep_tokens < 1 else ""
        inside = f", {spec.inside} inside" if spec.inside else ""
        return f"activations ({spec.server}, cut {cut}{inside}{home}{thin})"
    if isinstance(spec, ex.Parameters):
        said: list[str] = [spec.aggregation] if spec.aggregation not in ("mean", "uniform") else []
        said += ["pruned"] if spec.prune is not None else []
        said += ["balanced"] if spec.balance is not None else []
        said += ["with mentors"] if spec.mentor is not None else []
        said += [one.kind for one in (spec.client, spec.server)
                 if one.kind not in ("plain", "average")]  # fmt: skip
        return f"parameters ({', '.join(said)})" if said else "parameters"
    if isinstance(spec, ex.Logits):
        return "logits" if spec.server_model else "logits (no server model)"
    if isinstance(spec, ex.Standalone) and spec.public:
        return "public-only"
    if isinstance(spec, ex.Standalone) and spec.steps:
        return "standalone-equal-steps"
    return spec.kind


def costs(rows: Iterable[Row], rounds: int) -> dict[str, dict[str, Any]]:
    """
    Per client (and ``server``): totals over all rounds, evaluation left out.

    bytes_up, bytes_down (whole frames without what clients say of their own costs), payload_up,
    payload_down by role, flops, seconds, peak_memory, optimizer_steps, examples, tokens, failures.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.step == "eval":
            continue
        mine = found.setdefault(
            row.client,
            {
                "bytes_up": 0, "bytes_down": 0, "payload_up": {}, "payload_down": {}, "flops": 0,
                "seconds": 0.0, "peak_memory": 0, "optimizer_steps": 0, "examples": 0,
                "tokens": 0, "failures": 0,
            },
        )  # fmt: skip
        if row.direction in ("up", "down") and row.role != "measurement":
            mine[f"bytes_{row.direction}"] += row.wire_bytes
            if row.payload_bytes:
                roles = mine[f"payload_{row.direction}"]
                roles[row.role] = roles.get(row.role, 0) + row.payload_bytes
        for name in ("flops", "seconds", "optimizer_steps", "examples", "tokens", "failures"):
            mine[name] += getattr(row, name)
        mine["peak_memory"] = max(mine["peak_memory"], row.peak_memory)
    return dict(sorted(found.items()))


def per_client_round(costs_: dict[str, dict[str, Any]], rounds: int) -> dict[str, float]:
    """Means over clients and rounds (peak_memory: the largest)."""
    clients = [cost for client, cost in costs_.items() if client != "server"]
    if not clients:
        return {}
    names = ("bytes_up", "bytes_down", "flops", "seconds", "optimizer_steps")
    mean = {name: sum(c[name] for c in clients) / len(clients) / rounds for name in names}
    return mean | {"peak_memory": max(c["peak_memory"] for c in clients)}


def _headline(entry: dict[str, Any]) -> str:
    if entry.get("global"):
        return "global"
    return "mean of clients" if len(entry["clients"]) > 1 else "one place"


def headline(entry: dict[str, Any]) -> dict[str, Any]:
    """The model a run ends with: the common one, or the mean of the clients' own."""
    return dict(entry.get("global") or entry.get("mean") or {})


def summarize(
    experiment: ex.Experiment, seed: int, rows: Iterable[Row], history: list[dict[str, Any]],
    notes: Notes,
) -> dict[str, Any]:  # fmt: skip
    """The contents of ``summary.json``; numbers are those of the last round."""
    last = history[-1]
    total = costs(rows, experiment.rounds)
    flags = list(notes.notes)
    spec = experiment.strategy
    if isinstance(spec, ex.Activations) and spec.labels == "server":
        flags.append("labels travel to the server in clear (strategy.labels = 'client' keeps them)")
    if experiment.training.base_dropout:
        flags.append("the frozen base dropped out, too (training.base_dropout)")
    if missing := headline(last).get("missing_clients"):
        flags.append(f"{missing} clients failed in the last evaluation and are not in it")
    if experiment.public.labelled and isinstance(spec, ex.Logits):
        flags.append("the public set's labels were used")
    if experiment.model.weights == "random":
        flags.append("the base model started from random weights")
    return {
        "name": experiment.name,
        "strategy": spec.kind,
        "variant": variant(experiment),
        "task": experiment.task.kind,
        "model": experiment.model.name,
        "tunables": experiment.tunables.kind,
        "seed": seed,
        "rounds": experiment.rounds,
        "headline": _headline(last),
        "metrics": headline(last),
        "global": last.get("global"),
        "mean": last.get("mean"),
        "clients": last.get("clients", {}),
        "product_gap": last.get("product_gap"),
        "history": history,
        "costs": total,
        "per_client_round": per_client_round(total, experiment.rounds),
        "flags": flags,
    }
