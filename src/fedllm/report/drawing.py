"""``fedllm report``: which report of which folders goes where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import FedllmError, nearest
from fedllm.report import budget, formats, joint, page, plots, sinks, watch
from fedllm.report.budget import Budget, Target
from fedllm.report.gather import Gathered, gather
from fedllm.report.tables import Sheet


@dataclass(frozen=True)
class Drawing:
    """What was asked for, checked."""

    folders: tuple[Path, ...]
    kind: str
    target: Path
    budgets: tuple[Budget, ...] = ()
    targets: tuple[Target, ...] = ()
    anyway: bool = False

    def tables(self, found: Gathered) -> list[Sheet]:
        """Budgets and targets."""
        metric = plots.PRIMARY[found.summary["task"]][0]
        return budget.protocols(found.entries, self.budgets, self.targets, metric)

    def draw(self, found: Gathered, live: bool = False) -> Path:
        """
        Write the report.

        Raises FedllmError where the folders may not stand in one table, or nothing can be written.
        """
        # what still runs has rounds and seeds before it: the end of it decides
        warnings = joint.refuse(found, self.anyway or not found.complete)
        text = formats.made(self.kind, found, self.tables(found), warnings, live)
        try:
            return page.save(self.target, text)
        except OSError as error:
            raise FedllmError(f"{self.target}: cannot be written ({error.strerror})") from None


def asked(
    folders: Sequence[Path], out: Path | None, kind: str, budgets: Sequence[str],
    targets: Sequence[str], anyway: bool,
) -> Drawing:  # fmt: skip
    """
    Options of the command line as a drawing.

    Without ``out``, one folder's report lies in it, and that of several here. Raises FedllmError
    for a format, budget or target that is none.
    """
    if kind not in formats.FORMATS:
        raise FedllmError(f"--format {kind}: unknown; {nearest(kind, formats.FORMATS)}")
    beside = folders[0] if len(folders) == 1 else Path()
    return Drawing(
        tuple(folders), kind, out or beside / f"report.{kind}",
        tuple(budget.budget(text) for text in budgets),
        tuple(budget.target(text) for text in targets), anyway,
    )  # fmt: skip


def watched(asked: Drawing, to: Sequence[str], say: Callable[[str], None], on: bool) -> Gathered:
    """
    Draw what is finished, or, if ``on``, what is committed until all is; rows go ``to`` sinks, too.

    Ctrl-C ends watching, and what was committed until then is what is returned.
    """
    places = [sinks.sink(text, asked.target.parent) for text in to]
    last: list[Gathered] = []

    def draw(found: Gathered) -> None:
        last[:] = [found]
        asked.draw(found, live=on and not found.complete)

    watching = watch.Watch(asked.folders, draw, say if on else lambda _: None, places)
    try:
        if on:
            _wait(watching, asked.folders, say)
        else:
            watching.show(gather(asked.folders))
    finally:
        for place in places:
            place.close()
    if not last:
        raise FedllmError(f"{asked.folders[0]}: no committed round to draw")
    return last[0]


def _wait(watching: watch.Watch, folders: Sequence[Path], say: Callable[[str], None]) -> None:
    for folder in folders:
        if not folder.exists():
            say(f"waiting for {folder}")
    try:
        watch.watch(watching)
    except KeyboardInterrupt:
        say("stopped watching; the run goes on by itself")
