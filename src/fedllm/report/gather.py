"""The runs in one or many folders, seeds of one thing together, as one summary."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedllm import compare, ledger
from fedllm import experiment as ex
from fedllm.errors import FedllmError
from fedllm.report import ledgers
from fedllm.report.ledgers import Spent
from fedllm.summary import summarize


@dataclass(frozen=True)
class Run:
    """One run with one seed. settings: the keys of its ``experiment.toml``, dotted."""

    folder: Path
    summary: dict[str, Any]
    settings: dict[str, Any]
    spent: Spent

    @property
    def done(self) -> int:
        """Committed rounds."""
        return len(self.summary["history"])


@dataclass(frozen=True)
class Entry:
    """A line of the tables: one thing that was run, with one or several seeds."""

    name: str
    part: dict[str, Any]  # as in a comparison's summary
    runs: tuple[Run, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The first seed's settings; empty where its folder is not there."""
        return self.runs[0].settings if self.runs else {}

    @property
    def seeds(self) -> list[int]:
        """Which seeds."""
        return [run.summary["seed"] for run in self.runs]


@dataclass(frozen=True)
class Gathered:
    """What a report is about. summary: of the folder, or of all folders together."""

    folders: tuple[Path, ...]
    summary: dict[str, Any]
    entries: tuple[Entry, ...]
    complete: bool = True

    @property
    def title(self) -> str:
        """The experiments' names."""
        return str(self.summary["name"])


DERIVED = {"standalone-equal-steps": ("strategy.steps",)}  # found out for each seed


class _Silent:
    notes: tuple[str, ...] = ()


def gather(folders: Sequence[Path], unfinished: bool = False) -> Gathered:
    """
    Everything that is in these run, comparison and sweep folders.

    unfinished: take committed rounds of what still runs, too. Raises FedllmError where there is no
    finished run, or where a folder does another task than the first.
    """
    each = [_folder(folder, unfinished) for folder in folders]
    if len(each) == 1:
        return each[0]
    tasks = {one.summary["task"]: one.folders[0] for one in each}
    if len(tasks) > 1:
        said = ", ".join(f"{task} ({folder})" for task, folder in tasks.items())
        raise FedllmError(f"task.kind differs: {said}; their qualities cannot stand in one table")
    entries = _named(each)
    return Gathered(
        tuple(folders), _together([one.summary for one in each], entries), entries,
        all(one.complete for one in each),
    )  # fmt: skip


def _folder(folder: Path, unfinished: bool) -> Gathered:
    complete = (folder / "summary.json").exists()
    stored = compare.read(folder) if complete or not unfinished else None
    found: dict[str, list[Run]] = {}
    for name, inner in _inside(folder):
        if name and stored is not None and name not in stored.get("parts", ()):
            continue  # somebody put it there
        run = _run(inner)
        if run is not None:
            found.setdefault(name or run.summary["strategy"], []).append(run)
    if stored is None:
        if not found:
            raise FedllmError(f"{folder}: no committed round here yet")
        entries = tuple(_entry(name, runs) for name, runs in found.items())
        return Gathered((folder,), _together([_first(found)], entries), entries, complete=False)
    parts = stored.get("parts") or {stored["strategy"]: compare.combine([stored])}
    entries = tuple(Entry(name, part, tuple(found.get(name, ()))) for name, part in parts.items())
    return Gathered((folder,), stored, entries)


def _first(found: dict[str, list[Run]]) -> dict[str, Any]:
    return next(iter(found.values()))[0].summary


def _inside(folder: Path) -> list[tuple[str, Path]]:
    """(part, run folder) of the runs in a folder, in the order in which they began."""
    if (folder / "ledger.jsonl").exists():
        return [("", folder)]
    ledgers_ = [*folder.glob("*/ledger.jsonl"), *folder.glob("*/seed-*/ledger.jsonl")]
    inner = sorted((path.parent for path in ledgers_), key=_began)
    return [(_part(path.relative_to(folder)), path) for path in inner]


def _part(path: Path) -> str:
    if len(path.parts) > 1:
        return path.parts[0]  # a sweep's point
    return "" if re.fullmatch(r"seed-\d+", path.name) else re.sub(r"-seed\d+$", "", path.name)


def _began(folder: Path) -> float:
    path = folder / "experiment.toml"
    return path.stat().st_mtime if path.exists() else 0.0


def _run(folder: Path) -> Run | None:
    """A run that is finished, or what is committed of it; None if nothing is."""
    complete = (folder / "summary.json").exists()
    summary = compare.read(folder) if complete else so_far(folder)
    if summary is None:
        return None
    return Run(
        folder, summary, settings(folder / "experiment.toml"),
        ledgers.read(folder / "ledger.jsonl", summary["history"][-1]["round"]),
    )  # fmt: skip


def so_far(folder: Path) -> dict[str, Any] | None:
    """The summary of a run's committed rounds; None before the first."""
    history = _committed(folder / "checkpoints")
    if not history:
        return None
    experiment = ex.load(folder / "experiment.toml")
    done = history[-1]["round"]
    evaluated = [entry for entry in history if "clients" in entry] or [{"clients": {}}]
    rows = (row for row in ledger.stream(folder / "ledger.jsonl") if row.round <= done)
    shortened = experiment.replace(rounds=done)
    found = summarize(shortened, experiment.seeds[0], rows, evaluated, _Silent())
    flags = [*found["flags"], f"unfinished: {done} of {experiment.rounds} rounds"]
    return {**found, "history": history, "flags": flags, "planned": experiment.rounds}


def _committed(folder: Path) -> list[dict[str, Any]]:
    for path in sorted(folder.glob("round-*/state.json"), reverse=True):
        try:
            return list(json.loads(path.read_text())["history"])
        except (OSError, ValueError, KeyError):
            continue  # a run that goes on removes old rounds meanwhile
    return []


def settings(path: Path) -> dict[str, Any]:
    """
    The keys of an experiment file, dotted, with the defaults of those that came later.

    Empty where there is no file. Raises FedllmError for one that cannot be read.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = ex.parse_text(text, str(path), path.parent, foreign=True)
    except FedllmError:  # of another version, perhaps: its keys are worth showing all the same
        try:
            return dict(flat(tomllib.loads(text)))
        except tomllib.TOMLDecodeError as error:
            raise FedllmError(f"{path}: not valid TOML: {error}") from None
    return dict(flat(found.model_dump(mode="json", exclude_none=True)))


def flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of all that is in a table and in the tables within it."""
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _entry(name: str, runs: Sequence[Run]) -> Entry:
    """Seeds together; one that has no quality yet waits for the others' sake."""
    some = [run for run in runs if run.summary["metrics"]] or list(runs)
    shared = set.intersection(*(set(run.summary["metrics"]) for run in some))
    summaries = [
        {**run.summary, "metrics": {k: v for k, v in run.summary["metrics"].items() if k in shared}}
        for run in some
    ]
    return Entry(name, compare.combine(summaries), tuple(some))


def _named(each: Sequence[Gathered]) -> tuple[Entry, ...]:
    """All entries, seeds together; where two have one name, their folders tell them apart."""
    labels = _labels([one.folders[0] for one in each])
    listed = [
        (label if len(one.entries) == 1 else f"{label}/{entry.name}", label, entry)
        for one, label in zip(each, labels, strict=True)
        for entry in one.entries
    ]
    merged = _seeds_together(listed)
    names = [entry.name for _, _, entry in merged]
    if len(set(names)) == len(names):
        return tuple(entry for _, _, entry in merged)
    found: list[Entry] = []
    taken: set[str] = set()
    for name, label, entry in merged:
        free = next(n for n in _numbered(name) if n not in taken)
        taken.add(free)
        same_as = entry.part.get("same_as")
        part = {**entry.part, "same_as": same_as and f"{label}/{same_as}"}
        found.append(replace(entry, name=free, part=part))
    return tuple(found)


def _numbered(name: str) -> Iterator[str]:
    """The name, then with numbers behind it."""
    yield name
    yield from (f"{name} ({number})" for number in itertools.count(2))


def _seeds_together(listed: Sequence[tuple[str, str, Entry]]) -> list[tuple[str, str, Entry]]:
    """Runs of several folders that differ in nothing but the seed become one entry."""
    found: dict[str, tuple[str, str, Entry]] = {}
    for name, label, entry in listed:
        free = ("seeds", "name", *DERIVED.get(entry.part["variant"], ()))
        kept = {k: v for k, v in entry.settings.items() if k not in free}
        key = json.dumps([kept, entry.part["variant"]], sort_keys=True) if kept else name
        other = found.get(key)
        if other is None:
            found[key] = (name, label, entry)
        elif set(other[2].seeds) & set(entry.seeds):
            found[name] = (name, label, entry)  # the same run twice stays twice
        else:
            joined = _entry(entry.name, (*other[2].runs, *entry.runs))
            shared = re.sub(r"[-_/]?seed[-_]?\d+$", "", other[0])
            found[key] = (shared or other[0], other[1], joined)
    return list(found.values())


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise FedllmError(f"{folders[0]}: named twice")


def _together(summaries: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> dict[str, Any]:
    """One summary over the entries, as a comparison's; what differs is listed."""

    def every(key: str) -> str:
        return ", ".join(dict.fromkeys(str(one[key]) for one in summaries))

    return {
        "name": every("name"),
        "kind": "report",
        "task": summaries[0]["task"],
        "model": ", ".join(dict.fromkeys(one["model"].rpartition("/")[2] for one in summaries)),
        "tunables": every("tunables"),
        "seeds": sorted({seed for one in summaries for seed in one.get("seeds") or [one["seed"]]}),
        "rounds": every("rounds"),
        "parts": {entry.name: entry.part for entry in entries},
        "base": summaries[0].get("base") if len(summaries) == 1 else None,
    }
