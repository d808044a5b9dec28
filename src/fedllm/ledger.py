"""
Append-only rows of what was measured.

One row sums everything of one (round, step, client, direction, role, codec): split learning
sends thousands of frames a round, and ``frames`` says how many a row stands for. Rows of a frame:
one per role with ``wire_bytes == payload_bytes``, one with role ``measurement`` for the costs that
a client reports, and one with role ``header`` for the rest, so that the sum of ``wire_bytes`` is
what crossed the transport.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from fedllm.errors import FedllmError


@dataclass(frozen=True, slots=True)
class Row:
    """
    direction is ``down`` (server to client), ``up``, or ``compute``.

    Units: bytes, floating-point operations, seconds; peak_memory in bytes of live tensors.
    """

    run: str
    round: int
    step: str
    client: str
    direction: str
    role: str = ""
    codec: str = ""
    payload_bytes: int = 0
    wire_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    examples: int = 0
    tokens: int = 0
    optimizer_steps: int = 0
    frames: int = 0
    failures: int = 0
    reason: str = ""
    cohort: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        """Rows of a round with equal keys are summed."""
        return (self.step, self.client, self.direction, self.role,
                self.codec, self.reason, self.cohort)  # fmt: skip


_SUMMED = ("payload_bytes", "wire_bytes", "flops", "seconds", "examples", "tokens",
           "optimizer_steps", "frames", "failures")  # fmt: skip
OPEN = 10_000  # rows of an open round in memory; of more, one key may have several rows
_NAMES = {field.name for field in fields(Row)}


def merge(a: Row, b: Row) -> Row:
    """Two rows of one key: sums, and the larger peak."""
    sums = {name: getattr(a, name) + getattr(b, name) for name in _SUMMED}
    return replace(a, peak_memory=max(a.peak_memory, b.peak_memory), **sums)


class Ledger:
    """Rows of one run. ``add`` fills the open round; ``commit`` writes it down for good."""

    def __init__(self) -> None:
        """Start in memory; ``attach`` gives it a file, and memory holds the open round only."""
        self.path: Path | None = None
        self._rows: list[Row] = []
        self._open: dict[tuple[object, ...], Row] = {}

    @property
    def rows(self) -> Iterable[Row]:
        """All committed rows; where there is a file, read from it one by one."""
        return self._rows if self.path is None else stream(self.path)

    def attach(self, path: Path, upto: int) -> None:
        """Go on with the file; rows of rounds after ``upto``, not committed then, are dropped."""
        self.path = path
        self._aside.unlink(missing_ok=True)
        if path.exists():
            rewritten = path.with_suffix(".tmp")
            with rewritten.open("w") as file:
                file.writelines(_line(row) for row in stream(path) if row.round <= upto)
            os.replace(rewritten, path)
        else:
            path.touch()

    def add(self, row: Row) -> None:
        """Add a row to the open round."""
        before = self._open.get(row.key)
        self._open[row.key] = row if before is None else merge(before, row)
        if self.path is not None and len(self._open) >= OPEN:
            self._write(self._aside)

    def rollback(self) -> None:
        """Forget the open round."""
        self._open.clear()
        if self.path is not None:
            self._aside.unlink(missing_ok=True)

    def commit(self) -> None:
        """Append the open round's rows, in the order in which their keys first came."""
        if self.path is None:
            self._rows.extend(self._open.values())
            self._open.clear()
            return
        if self._aside.exists():
            with self._aside.open("rb") as early, self.path.open("ab") as file:
                shutil.copyfileobj(early, file)
            self._aside.unlink()
        self._write(self.path)

    @property
    def _aside(self) -> Path:
        """Where rows of an open round wait that are too many for memory."""
        assert self.path is not None
        return self.path.with_suffix(".open")

    def _write(self, path: Path) -> None:
        with path.open("a") as file:
            file.writelines(_line(row) for row in self._open.values())
            file.flush()
            os.fsync(file.fileno())
        self._open.clear()


def _line(row: Row) -> str:
    return json.dumps(asdict(row), separators=(",", ":")) + "\n"


def read(path: Path) -> list[Row]:
    """Rows of a ``ledger.jsonl``, as ``stream`` gives them."""
    return list(stream(path))


def stream(path: Path) -> Iterator[Row]:
    """One row after another. A torn last line (killed while writing) is left out."""
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                row = Row(**{name: values[name] for name in _NAMES if name in values})
            except (ValueError, TypeError, KeyError):
                if not line.endswith("\n"):
                    return
                raise FedllmError(f"{path}: line {number} is not a ledger row") from None
            yield row


def total(rows: Iterable[Row], field: str, **where: object) -> float:
    """Sum of a field over the rows whose columns equal ``where``."""
    return sum(
        getattr(row, field)
        for row in rows
        if all(getattr(row, name) == value for name, value in where.items())
    )
