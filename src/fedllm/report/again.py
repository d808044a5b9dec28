"""The commands that make what a report shows once more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedllm.report.gather import Gathered


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
        made.append(Again(file, text, tuple(_commands(folder, file, out))))
    return made


def _word(folder: Path) -> str:
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name)


def _commands(folder: Path, file: str, out: str) -> Iterator[str]:
    if (folder / "ledger.jsonl").exists() or any(folder.glob("seed-*")):
        yield f"fedllm run {file} --out {out}"
    elif any(folder.glob("*/seed-*")):
        yield f"fedllm sweep {file} --out {out}"
    else:
        yield f"fedllm compare {file} --out {out}"
