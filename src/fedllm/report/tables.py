"""Tables of what was achieved and what it cost, on a terminal and in Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

QUALITY = {
    "classification": (("accuracy", "accuracy", 100), ("macro_f1", "macro-F1", 100)),
    "generation": (("loss", "loss", 1), ("perplexity", "perplexity", 1),
                   ("bits_per_byte", "bits/byte", 1), ("rouge_l", "Rouge-L", 100)),
    "multiple-choice": (("accuracy", "accuracy", 100),
                        ("accuracy_per_byte", "accuracy per byte", 100), ("loss", "loss", 1)),
    "preference": (("accuracy", "accuracy", 100), ("margin", "margin", 1), ("loss", "loss", 1)),
}  # fmt: skip
COSTS = (
    ("optimizer_steps", "steps"), ("bytes_up", "up"), ("bytes_down", "down"),
    ("flops", "FLOPs"), ("seconds", "seconds"), ("peak_memory", "memory"),
)  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """A table as shown, and the same in full precision, to be downloaded or computed with."""

    name: str
    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    data_header: Sequence[str] = ()
    data: Sequence[Sequence[Any]] = field(default=(), repr=False)
    note: str = ""

    def csv(self) -> str:
        """The data as CSV; where there is none, what is shown."""
        return as_csv(self.data_header or self.header, self.data or self.lines)


def as_csv(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """
    Rows as CSV text.

    A text that a spreadsheet would compute gets an apostrophe before it: names come from outside.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for line in (header, *lines):
        writer.writerow([_harmless(cell) for cell in line])
    return out.getvalue()


def _harmless(cell: Any) -> Any:
    risky = isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") and len(cell) > 1
    return f"'{cell}" if risky else cell


def size(value: float) -> str:
    """Bytes, e.g. ``1.2 MB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def amount(name: str, value: float) -> str:
    """A cost with its unit."""
    if name in ("bytes_up", "bytes_down", "peak_memory"):
        return size(value)
    if name == "flops":
        for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
            if value >= factor:
                return f"{value / factor:.2f} {unit}"
        return f"{value / 1e6:.2f} M"
    return f"{value:.1f}" if name == "seconds" else f"{value:.0f}"


def _number(entry: Any, factor: float) -> str:
    mean, sd = (entry["mean"], entry["sd"]) if isinstance(entry, dict) else (entry, 0.0)
    digits = 1 if factor == 100 else 3
    text = f"{mean * factor:.{digits}f}"
    return text + (f" ± {sd * factor:.{digits}f}" if sd else "")


def rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the closing table: quality, then costs per client and round."""
    runs = summary.get("parts") or {summary["strategy"]: summary}
    quality = [
        column for column in QUALITY[summary["task"]]
        if any(column[0] in run["metrics"] for run in runs.values())
    ]  # fmt: skip
    header = ["run", "model", *(title for _, title, _ in quality), *(t for _, t in COSTS)]
    table = []
    base = summary.get("base")
    if base:
        table.append(["before training", "base", *(
            _number(base[key], factor) if key in base else "" for key, _, factor in quality
        ), *("" for _ in COSTS)])  # fmt: skip
    for name, run in runs.items():
        label = run["variant"] if run["variant"].startswith(name) else name
        if run.get("same_as"):
            label += f" (= {run['same_as']})"
        line = [label, run["headline"]]
        for key, _, factor in quality:
            line.append(_number(run["metrics"][key], factor) if key in run["metrics"] else "")
        for key, _ in COSTS:
            value = run["per_client_round"].get(key, 0)
            value = value["mean"] if isinstance(value, dict) else value
            line.append(amount(key, value))
        table.append(line)
    return header, table


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    out = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*out, *("| " + " | ".join(line) + " |" for line in lines)])


def show_table(found: Sheet) -> None:
    """Print one table."""
    console = Console(width=None if Console().is_terminal else 150)
    table = Table(title=Text(found.title), caption=Text(found.note) if found.note else None)
    for position, name in enumerate(found.header):
        table.add_column(name, justify="left" if position == 0 else "right")
    for line in found.lines:
        table.add_row(*(Text(cell) for cell in line))
    console.print(table)


def show(summary: dict[str, Any]) -> None:
    """Print the closing table."""
    console = Console(width=None if Console().is_terminal else 150)
    header, lines = rows(summary)
    seeds = summary.get("seeds") or [summary["seed"]]
    title = (
        f"{summary['name']}: {summary['model'].rsplit('/', 1)[-1]}, {summary['tunables']}, "
        f"{summary['rounds']} rounds, seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}"
    )
    table = Table(
        title=Text(title), caption="costs are means per client and round; memory is the peak"
    )
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position < 2 else "right")
    for line in lines:
        table.add_row(*map(Text, line))
    console.print(table)
    runs = summary.get("parts") or {"": summary}
    for flag in sorted({flag for run in runs.values() for flag in run["flags"]}):
        console.print(f"note: {flag}", style="yellow", markup=False)


def handshake(found: dict[str, Any]) -> None:
    """Print what the sites of a federation said, beside what the server says."""
    console = Console(width=None if Console().is_terminal else 150)
    table = Table("", *found["server"], title="handshake")
    for name, facts in (("server", found["server"]), *sorted(found["sites"].items())):
        cells = []
        for key, ours in found["server"].items():
            value = str(facts.get(key, "")) or "-"
            shown = value if len(value) <= 24 else f"{value[:21]}..."
            cells.append(Text(shown, style="" if facts.get(key) == ours else "red"))
        table.add_row(name, *cells)
    console.print(table)


def rehearsal(found: Sequence[tuple[str, str, bool]]) -> None:
    """Print what ``fedllm site check`` found."""
    console = Console(width=None if Console().is_terminal else 150)
    table = Table(title="what this site would answer", show_header=False)
    for what, said, good in found:
        table.add_row(what, Text(said), style=None if good else "red")
    console.print(table)


def check(found: dict[str, Any]) -> None:
    """Print what ``fedllm check`` found."""
    console = Console(width=None if Console().is_terminal else 150)
    table = Table(title=Text(found["title"]), show_header=False)
    for key, value in found["facts"].items():
        table.add_row(key, Text(str(value)))
    console.print(table)
    cost = Table(title="estimate per client and round", caption=found["caption"])
    for position, name in enumerate(found["header"]):
        cost.add_column(name, justify="left" if position == 0 else "right")
    for line in found["rows"]:
        cost.add_row(*map(Text, line))
    console.print(cost)
    for note in found["notes"]:
        console.print(f"note: {note}", style="yellow", markup=False)
