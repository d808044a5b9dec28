"""The tables of a report: rounds, roles, clients, faults and settings, each with its data."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedllm.report import joint, ledgers, plots, tables
from fedllm.report.gather import Entry, Gathered, Run
from fedllm.report.tables import Sheet, amount, size
from fedllm.round import SAID

MANY = 100  # lines on the page; the CSV has all
CLIENT_COSTS = (
    ("bytes_up", "up"), ("bytes_down", "down"), ("flops", "FLOPs"), ("seconds", "seconds"),
    ("optimizer_steps", "steps"), ("failures", "faults"),
)  # fmt: skip


def closing(found: Gathered) -> Sheet:
    """Quality and costs, one line a run, as on the terminal."""
    header, lines = tables.rows(found.summary)
    runs = found.summary.get("parts") or {found.summary["strategy"]: found.summary}
    metrics = list(dict.fromkeys(
        name for run in runs.values() for name, value in run["metrics"].items()
        if _number(value) is not None
    ))  # fmt: skip
    costs = [key for key, _ in tables.COSTS]
    data = []
    for name, run in runs.items():
        cells = [value for key in metrics for value in _spread(run["metrics"].get(key))]
        data.append([name, run["variant"], run["headline"], *cells,
                     *(_number(run["per_client_round"].get(key)) for key in costs)])  # fmt: skip
    columns = [column for key in metrics for column in (key, f"{key}_sd")]
    return Sheet(
        "results", "", header, lines, ["run", "variant", "model", *columns, *costs], data,
        "Quality is of the last round. Costs are means per client and round, evaluation left out; "
        "memory is the peak of live tensors.",
    )  # fmt: skip


def _number(value: Any) -> float | None:
    value = value.get("mean") if isinstance(value, Mapping) else value
    return value if isinstance(value, int | float) else None


def _spread(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Mapping):
        return value.get("mean"), value.get("sd")
    return value, (None if value is None else 0.0)


def history(found: Gathered) -> tuple[list[str], list[dict[str, Any]]]:
    """
    Columns and rows of all rounds: run, seed, round, what was measured, and what was spent.

    Costs are of the whole federation, from the first round on.
    """
    rows = [row for entry in found.entries for run in entry.runs for row in of_run(entry.name, run)]
    rows = rows or list(_from_summary(found.summary))
    columns = dict.fromkeys(key for row in rows for key in row if key not in ledgers.COSTS)
    costs = [key for key in ledgers.COSTS if any(key in row for row in rows)]
    return [*columns, *costs], rows


def of_run(name: str, run: Run) -> Iterator[dict[str, Any]]:
    """A row for each committed round of one run."""
    total = dict.fromkeys(ledgers.COSTS, 0.0)
    for entry in run.summary["history"]:
        now = run.spent.rounds.get(entry["round"], {})
        total = {key: value + now.get(key, 0) for key, value in total.items()}
        metrics = entry.get("global") or entry.get("mean") or {}
        yield {
            "run": name, "seed": run.summary["seed"], "round": entry["round"],
            **{k: v for k, v in entry.items() if k.endswith(SAID)
               and isinstance(v, int | float)} | {},
            **{f"eval_{k}": v for k, v in metrics.items() if isinstance(v, int | float)},
            **(total if run.spent.rounds else {}),
        }  # fmt: skip


def _from_summary(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rounds of a folder that holds a summary only."""
    seeds = summary.get("seeds") or [summary["seed"]]
    for name, run in plots.parts_of(summary).items():
        histories = run["history"] if "parts" in summary else [run["history"]]
        for seed, entries in zip(seeds, histories, strict=False):
            for entry in entries:
                metrics = entry.get("metrics") or entry.get("global") or entry.get("mean") or {}
                plain = {f"eval_{k}": v for k, v in metrics.items() if isinstance(v, int | float)}
                yield {"run": name, "seed": seed, "round": entry["round"], **plain}


def curves(found: Gathered) -> Sheet:
    """The rounds, for the CSV of the curves."""
    columns, rows = history(found)
    data = [[row.get(column, "") for column in columns] for row in rows]
    return Sheet("rounds", "", [], [], columns, data)


def trade_off(found: Gathered) -> Sheet:
    """The points of the scatter."""
    key = plots.title_of(found.summary)[0]
    data = [
        [name, run["strategy"], *_spread(run["metrics"].get(key)), plots.cost(run, "bytes"),
         plots.cost(run, "flops")]
        for name, run in plots.parts_of(found.summary).items()
        if key in run["metrics"]
    ]  # fmt: skip
    columns = ["run", "strategy", key, f"{key}_sd", "bytes_a_client_and_round",
               "client_flops_a_client_and_round"]  # fmt: skip
    return Sheet("trade-off", "", [], [], columns, data)


def roles(entries: Sequence[Entry]) -> Sheet:
    """Bytes by direction and role, a client and round; means over seeds."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for entry in entries:
        for key in {key for run in entry.runs for key in run.spent.roles}:
            each = [run.spent.roles.get(key, 0) / max(_clients(run), 1) / run.done
                    for run in entry.runs]  # fmt: skip
            found.setdefault(key, {})[entry.name] = statistics.fmean(each)
    keys = sorted(found, key=lambda key: (key[0] == "down", key[1] == "header", key[1]))
    names = [entry.name for entry in entries if entry.runs]
    lines = [
        [f"{direction}: {role}", *(size(value[name]) if name in value else "" for name in names)]
        for direction, role in keys
        for value in [found[direction, role]]
    ]
    data = [[name, direction, role, found[direction, role][name]]
            for name in names for direction, role in keys
            if name in found[direction, role]]  # fmt: skip
    return Sheet(
        "roles", "Bytes by direction and role", ["", *names], lines,
        ["run", "direction", "role", "bytes_a_client_and_round"], data,
        "Means per client and round, evaluation left out; header is the rest of each frame.",
    )  # fmt: skip


def _clients(run: Run) -> int:
    return sum(name != "server" for name in run.summary["costs"])


def server(entries: Sequence[Entry]) -> Sheet:
    """What the server computed, a round."""
    lines, data = [], []
    for entry in entries:
        costs = entry.part.get("server_per_round", {})
        values = [_number(costs.get(key)) or 0.0 for key in ("flops", "seconds", "optimizer_steps")]
        if values[0] >= 1e4 or values[2]:  # a mean of tensors is no computation to speak of
            lines.append([entry.name, amount("flops", values[0]), f"{values[1]:.1f}",
                          f"{values[2]:.0f}"])  # fmt: skip
            data.append([entry.name, *values])
    return Sheet("server", "The server's computation", ["run", "FLOPs", "seconds", "steps"], lines,
                 ["run", "flops_a_round", "seconds_a_round", "optimizer_steps_a_round"], data,
                 "Means per round, evaluation left out.")  # fmt: skip


def products(entries: Sequence[Entry]) -> Sheet:
    """How far what the server makes of LoRA's factors lies from the mean of their products."""
    lines, data = [], []
    for entry in entries:
        gaps = [[e["product_gap"] for e in run.summary["history"] if "product_gap" in e]
                for run in entry.runs]  # fmt: skip
        if gaps and all(gaps):
            ends = [statistics.fmean(gap[place] for gap in gaps) for place in (0, -1)]
            lines.append([entry.name, *(f"{value:.1%}" for value in ends)])
            data.append([entry.name, *ends])
    return Sheet(
        "products", "Distance from the mean of products", ["run", "first round", "last round"],
        lines, ["run", "first_round", "last_round"], data,
        "Relative Frobenius norm over all modules, between what the common model adds and the mean "
        "of what the clients' would add; means over seeds.",
    )  # fmt: skip


def clients(found: Gathered) -> Sheet:
    """Each client's quality in each run, means over seeds."""
    key, title, factor = plots.title_of(found.summary)
    runs = {name: _each_client(run, found.summary, key)
            for name, run in plots.parts_of(found.summary).items()}  # fmt: skip
    names = sorted({client for run in runs.values() for client in run}, key=_natural)
    digits = 1 if factor == 100 else 3
    lines = [
        [client, *(f"{run[client] * factor:.{digits}f}" if client in run else ""
                   for run in runs.values())]
        for client in names[:MANY]
    ]  # fmt: skip
    data = [[client, *(run.get(client, "") for run in runs.values())] for client in names]
    return Sheet(
        "clients",
        f"Clients: {title}",
        ["client", *runs],
        lines,
        ["client", *runs],
        data,
        _cut(len(names), "Each client's own held-out rows, after the last round."),
    )


def _each_client(run: Mapping[str, Any], summary: Mapping[str, Any], key: str) -> dict[str, float]:
    each = run["clients"] if "parts" in summary else [run["clients"]]
    values: dict[str, list[float]] = {}
    for one in each:
        for client, metrics in one.items():
            if key in metrics:
                values.setdefault(client, []).append(metrics[key])
    return {client: statistics.fmean(value) for client, value in values.items()}


def client_costs(entries: Sequence[Entry]) -> Sheet:
    """What each client sent, computed and missed in the whole run; means over seeds."""
    lines, data = [], []
    for entry in entries:
        names = {client for run in entry.runs for client in run.summary["costs"]}
        for client in sorted(names - {"server"}, key=_natural):
            each = [run.summary["costs"].get(client, {}) for run in entry.runs]
            values = [statistics.fmean(float(one.get(key, 0)) for one in each)
                      for key, _ in CLIENT_COSTS]  # fmt: skip
            data.append([entry.name, client, *values])
            lines.append([entry.name, client, *(
                amount(key, value) for (key, _), value in zip(CLIENT_COSTS, values, strict=True)
            )])  # fmt: skip
    return Sheet(
        "client-costs", "Clients: costs of the whole run",
        ["run", "client", *(title for _, title in CLIENT_COSTS)], lines[:MANY],
        ["run", "client", *(key for key, _ in CLIENT_COSTS)], data,
        _cut(len(lines), "Evaluation left out."),
    )  # fmt: skip


def _natural(name: str) -> tuple[str, int]:
    """client-2 before client-10."""
    digits = name[len(name.rstrip("0123456789")) :]
    return name.removesuffix(digits), int(digits or 0)


def _cut(number: int, note: str) -> str:
    return f"{note} The first {MANY} of {number}; the CSV has all." if number > MANY else note


def faults(entries: Sequence[Entry]) -> Sheet:
    """Who failed when and why, from the ledgers."""
    found: dict[tuple[Any, ...], list[int]] = {}
    counts: dict[tuple[Any, ...], int] = {}
    data = []
    for entry in entries:
        for run in entry.runs:
            seed = run.summary["seed"]
            for row in run.spent.faults:
                key = (entry.name, seed, row.client, row.step, row.reason)
                found.setdefault(key, []).append(row.round)
                counts[key] = counts.get(key, 0) + row.failures
                data.append([entry.name, seed, row.round, row.client, row.step, row.failures,
                             row.reason])  # fmt: skip
    lines = [
        [name, client, why, spans(rounds), step, str(counts[name, seed, client, step, why]),
         str(seed)]
        for (name, seed, client, step, why), rounds in found.items()
    ]  # fmt: skip
    return Sheet(
        "faults", "Faults", ["run", "client", "why", "rounds", "step", "times", "seed"],
        lines[:MANY], ["run", "seed", "round", "client", "step", "times", "why"], data,
        _cut(len(lines), "Clients that did not answer, or not usefully; the round went on without "
             "them."),
    )  # fmt: skip


def spans(numbers: Sequence[int]) -> str:
    """Rounds in short: ``1, 4-7``."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def settings(entries: Sequence[Entry]) -> Sheet:
    """Which keys of the experiment are not the same in all runs."""
    header, lines, whole = joint.settings(entries)
    return Sheet("settings", "Settings that differ", header, lines, header, whole,
                 "All others are the same in all runs.")  # fmt: skip
