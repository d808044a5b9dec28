"""A progress bar with the paper's steps by name, and time left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedllm.federation import Listener, Silent


class Bar:
    """Shows one bar per run, and what is going on in it."""

    def __init__(self, bar: Progress) -> None:
        """Draw into ``bar``."""
        self.bar = bar
        self.task: Any = None
        self.rows = 0
        self.now = ("", "")

    def begin(self, name: str, rounds: int, done: int) -> None:
        """A new bar, counting rounds."""
        self.task = self.bar.add_task(name, total=rounds, completed=done, doing="")

    def step(self, step: str, client: str, rows: int) -> None:
        """Say the step, the client, and the rows it did."""
        if step:
            self.now, self.rows = (step, client), 0
        elif client != self.now[1]:
            self.now, self.rows = (self.now[0], client), 0
        self.rows += rows
        if self.task is not None:
            doing = f"{self.now[0]} {client} {self.rows or ''}"
            self.bar.update(self.task, doing=doing)

    def round(self, entry: Mapping[str, Any]) -> None:
        """One round more, with its quality."""
        found = entry.get("global") or entry.get("mean") or {}
        shown = [f"{name} {found[name]:.3f}" for name in ("accuracy", "loss", "bits_per_byte")
                 if name in found]  # fmt: skip
        if self.task is not None:
            self.bar.update(self.task, completed=entry["round"], doing="")
            if shown:
                description = self.bar.tasks[self.task].description.split("  ")[0]
                self.bar.update(self.task, description=f"{description}  {', '.join(shown[:2])}")

    def note(self, text: str) -> None:
        """A line above the bars."""
        self.bar.console.print(f"note: {text}", style="yellow", markup=False)


@contextmanager
def progress(quiet: bool) -> Iterator[Listener]:
    """A listener that draws on standard error, or none."""
    if quiet:
        yield Silent()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.fields[doing]}", style="dim"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Bar(bar)
