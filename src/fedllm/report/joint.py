"""Whether runs may stand in one table, and what differs between them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from fedllm.errors import FedllmError
from fedllm.report.gather import Entry, Gathered

BUDGET = ("rounds", "training.epochs", "training.batch_size", "exchange.clients_per_round")
DATA = ("data.", "simulation.", "task.")
ALSO_DATA = ("public.source", "public.size", "evaluation.on")
APART = ("seeds", "name", "simulation.cohort")  # nothing that a run computes depends on these

SAID = 4  # differences in an error
LONGEST = 60  # letters of a value as it is shown
MISSING = "missing_clients"


def refuse(found: Gathered, anyway: bool = False) -> list[str]:
    """
    What makes a joint table of several folders unfair; raises FedllmError with it.

    anyway: only say it. One folder was made by one command, which asked for what differs in it.
    """
    wrong = differences(found.entries)
    unknown = [e.name for e in found.entries if not e.runs and not e.part.get("same_as")]
    if unknown and len(found.folders) > 1:
        wrong.append(f"data and budget unknown: no experiment.toml and ledger of {_some(unknown)}")
    if wrong and len(found.folders) > 1 and not anyway:
        more = f"; and {len(wrong) - SAID} more" if len(wrong) > SAID else ""
        raise FedllmError(
            f"no joint table: {'; '.join(wrong[:SAID])}{more} (--anyway shows it all the same)"
        )
    return wrong


def differences(entries: Sequence[Entry]) -> list[str]:
    """Where data, split or budget differ, and between which runs; empty where none does."""
    known = [entry for entry in entries if entry.runs]
    keys = list(dict.fromkeys(key for entry in known for key in entry.settings))
    wrong = []
    for key in keys:
        kind = _kind(key)
        said = _values([(entry.name, entry.settings.get(key)) for entry in known])
        if kind and said:
            wrong.append(f"{kind} differs, {key}: {said}")
    if said := _values([(entry.name, sorted(entry.seeds)) for entry in known]):
        wrong.append(f"split differs, seeds: {said}")
    there = [(entry.name, found) for entry in known if (found := _clients(entry)) is not None]
    if not wrong and (said := _values(there)):
        wrong.append(f"split differs, clients and their held-out rows: {said}")
    counted = [(entry.name, rows) for entry in known if (rows := _rows(entry)) is not None]
    if not wrong and (said := _values(counted)):
        wrong.append(f"data differs, held-out rows of the evaluation: {said}")
    return wrong


def _kind(key: str) -> str:
    if key in APART:
        return ""
    if key in BUDGET:
        return "budget"
    return "data" if key.startswith(DATA) or key in ALSO_DATA else ""


def _clients(entry: Entry) -> dict[str, Any] | None:
    """
    Who the clients are and how many rows each is judged on: at sites no setting says so.

    None where clients failed, or where all data lie in one place.
    """
    summary = entry.runs[0].summary
    each = summary["clients"]
    if summary["strategy"] == "centralized" or not each or summary["metrics"].get(MISSING):
        return None
    return {client: found.get("units") for client, found in sorted(each.items())}


def _rows(entry: Entry) -> Any:
    """How many rows the quality is of; None where clients failed, or rows are not counted."""
    summary = entry.runs[0].summary
    metrics = summary["metrics"]
    counted = {
        "classification": "units", "multiple-choice": "questions", "preference": "units",
    }.get(summary["task"])  # fmt: skip
    return metrics.get(counted) if counted and not metrics.get(MISSING) else None


def _values(each: Iterable[tuple[str, Any]]) -> str:
    """Each value with whose it is; empty where there is but one."""
    whose: dict[str, list[str]] = {}
    for name, value in each:
        whose.setdefault(json.dumps(value), []).append(name)
    if len(whose) < 2:
        return ""
    said = shorter([json.loads(value) for value in whose])
    return " / ".join(
        f"{value} ({_some(names)})" for value, names in zip(said, whose.values(), strict=True)
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shown(value: Any) -> str:
    """A setting; a dash where a run has no such key."""
    return "-" if value is None else json.dumps(value, ensure_ascii=False)


def shorter(values: Sequence[Any]) -> list[str]:
    """Values in few words each: the beginning of long ones, or where they begin to differ."""
    texts = [shown(value) for value in values]
    if all(len(text) <= LONGEST for text in texts):
        return texts
    letters = zip(*texts, strict=False)
    alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, letters))
    begin = max(alike - LONGEST // 3, 0)
    some = LONGEST - 6
    return [
        f"{'...' if begin else ''}{text[begin : begin + some]}"
        f"{'...' if len(text) > begin + some else ''}"
        for text in texts
    ]


def settings(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Header and rows of the settings that are not the same in all runs, short and whole."""
    known = [entry for entry in entries if entry.runs]
    keys = dict.fromkeys(key for entry in known for key in entry.settings)
    listed = [
        (key, [entry.settings.get(key) for entry in known])
        for key in keys
        if key not in APART and not key.startswith(("compare.", "plan."))
    ]
    listed.append(("seeds", [sorted(entry.seeds) for entry in known]))
    unlike = [(key, values) for key, values in listed if len(set(map(shown, values))) > 1]
    return (
        ["setting", *(entry.name for entry in known)],
        [[key, *shorter(values)] for key, values in unlike],
        [[key, *map(shown, values)] for key, values in unlike],
    )
