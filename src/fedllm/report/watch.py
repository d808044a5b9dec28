"""A report of runs that still go on, drawn again as their rounds are committed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedllm.report import plots, sheets
from fedllm.report.gather import Gathered, gather
from fedllm.report.sinks import Row, Sink

EVERY = 1.0  # seconds between two looks


class Watch:
    """
    Which rounds were seen. ``look`` finds the new ones; nothing is read where nothing changed.

    draw: makes the report.  say: takes a line for each new round.
    """

    def __init__(
        self, folders: Sequence[Path], draw: Callable[[Gathered], None],
        say: Callable[[str], None], sinks: Sequence[Sink] = (),
    ) -> None:  # fmt: skip
        """Watch these folders; none of them need be there yet."""
        self._folders, self._draw, self._say, self._sinks = folders, draw, say, sinks
        self._before: dict[Path, int] = {}
        self._told: dict[Path, int] = {}

    def look(self) -> bool:
        """Say, send and draw what is new. Returns whether all folders are complete."""
        now = {path: stat for folder in self._folders for path, stat in _state(folder)}
        started = all(any(folder in path.parents for path in now) for folder in self._folders)
        if not started or now == self._before:
            return False
        try:
            found = gather(self._folders, unfinished=True)
        except FileNotFoundError:  # an old checkpoint went while it was read
            return False
        self._before = now
        self.show(found)
        return found.complete

    def show(self, found: Gathered) -> None:
        """Say, send and draw what of this is new."""
        self._draw(found)
        self._tell(found)

    def _tell(self, found: Gathered) -> None:
        for entry in found.entries:
            for run in entry.runs:
                seen = self._told.get(run.folder, 0)
                total = run.settings.get("rounds", run.done)
                for row in sheets.of_run(entry.name, run):
                    if row["round"] > seen:
                        self._say(line(found, row, total))
                        for sink in self._sinks:
                            sink.write(row, run.settings)
                self._told[run.folder] = run.done


def line(found: Gathered, row: Row, total: int) -> str:
    """A round in words."""
    key, title, factor = plots.title_of(found.summary)
    value = row.get(f"eval_{key}")
    said = "" if value is None else f", {title} {value * factor:.{1 if factor == 100 else 3}f}"
    return f"{row['run']}, seed {row['seed']}: round {row['round']} of {total}{said}"


def _state(folder: Path) -> Iterator[tuple[Path, int]]:
    """Files that change with a committed round, and when each did."""
    for depth in ("", "*/", "*/*/"):
        for name in ("summary.json", "checkpoints/round-*/state.json"):
            for path in folder.glob(depth + name):
                try:
                    yield path, path.stat().st_mtime_ns
                except FileNotFoundError:
                    continue


def watch(watching: Watch, every: float = EVERY) -> None:
    """Look until all is complete; KeyboardInterrupt ends it, too, and is raised."""
    while not watching.look():
        time.sleep(every)
