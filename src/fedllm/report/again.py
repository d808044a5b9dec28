"""The commands that make what a report shows once more."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.report.gather import Gathered, flat


@dataclass(frozen=True)
class Again:
    """An experiment file, and the commands that run it."""

    file: str
    text: str
    commands: tuple[str, ...]


def again(found: Gathered) -> list[Again]:
    """One for each folder that has its experiment."""
    folders = [folder for folder in found.folders if (folder / "experiment.toml").exists()]
    made: list[Again] = []
    for number, folder in enumerate(folders, 1):
        file = "experiment.toml" if len(folders) == 1 else f"{number}-{_word(folder)}.toml"
        out = "again" if len(folders) == 1 else f"again-{number}"
        text = (folder / "experiment.toml").read_text(encoding="utf-8")
        made.append(Again(file, text, tuple(_commands(folder, found, file, out))))
    return made


def _word(folder: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name)


def _commands(folder: Path, found: Gathered, file: str, out: str) -> Iterator[str]:
    if (folder / "ledger.jsonl").exists() or any(folder.glob("seed-*")):
        yield f"fedllm run {file} --out {out}"
    elif any(folder.glob("*/seed-*")):
        for number, (name, changes) in enumerate(_points(folder, found).items(), 1):
            sets = "".join(f" --set {shlex.quote(change)}" for change in changes)
            yield f"fedllm run {file}{sets} --out {out}/{number}  # {name}"
    else:
        yield f"fedllm compare {file} --out {out}"


def _points(folder: Path, found: Gathered) -> dict[str, list[str]]:
    """What each point of a sweep sets."""
    return {
        entry.name: _changes(entry.part.get("settings", {}))
        for entry in found.entries
        if any(folder in run.folder.parents for run in entry.runs)
    }


def _changes(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in flat(dict(settings))]
