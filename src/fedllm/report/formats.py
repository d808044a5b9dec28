"""A report as Markdown, CSV, JSON or a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fedllm.report import page, plots, sheets
from fedllm.report.again import again
from fedllm.report.gather import Gathered
from fedllm.report.tables import Sheet

FORMATS = ("html", "md", "csv", "json", "png")


def made(
    kind: str, found: Gathered, tables: Sequence[Sheet], warnings: Sequence[str], live: bool = False
) -> str | bytes:
    """The report in one of ``FORMATS``."""
    if kind == "html":
        return page.render(found, tables, warnings, live)
    if kind == "md":
        return markdown(found, tables, warnings)
    if kind == "csv":
        return rounds(found)
    if kind == "json":
        return as_json(found, tables, warnings)
    return plots.png(found.summary)


def rounds(found: Gathered) -> str:
    """A line for each run, seed and round: what was measured, and all that was spent so far."""
    return sheets.curves(found).csv()


def _sheets(found: Gathered, tables: Sequence[Sheet]) -> list[Sheet]:
    entries = found.entries
    return [
        sheets.closing(found), *tables, sheets.roles(entries), sheets.clients(found),
        sheets.client_costs(entries), sheets.server(entries), sheets.faults(entries),
        sheets.settings(entries),
    ]  # fmt: skip


def markdown(found: Gathered, tables: Sequence[Sheet], warnings: Sequence[str]) -> str:
    """Tables and notes; the clients' costs are left to the other formats."""
    parts = [f"# {_plain(found.title)}"]
    runs = found.summary.get("parts") or {"": found.summary}
    flags = sorted({flag for run in runs.values() for flag in run["flags"]})
    parts += [f"> Not like for like: {_plain(warning)}" for warning in warnings]
    parts += [f"> {_plain(flag)}" for flag in flags]
    for sheet in _sheets(found, tables):
        if sheet.lines and sheet.name != "client-costs":
            parts += [f"## {_plain(sheet.title)}"] * bool(sheet.title)
            parts += [_table(sheet), _plain(sheet.note)]
    for one in again(found):
        parts += ["## The same again", "```sh\n" + "\n".join(one.commands) + "\n```"]
        parts.append(f"```toml\n# {one.file}\n{one.text}```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Text that means nothing in Markdown or HTML."""
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(sign, safe)
    return text


def _table(sheet: Sheet) -> str:
    lines = [sheet.header, ["---"] * len(sheet.header), *sheet.lines]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def as_json(found: Gathered, tables: Sequence[Sheet], warnings: Sequence[str]) -> str:
    """Everything in full precision: the summary, the rounds, and each table's data."""
    everything: dict[str, Any] = {
        "summary": found.summary,
        "warnings": list(warnings),
        "rounds": sheets.history(found)[1],
        "tables": {
            sheet.name: {
                "title": sheet.title,
                "columns": list(sheet.data_header or sheet.header),
                "rows": [list(line) for line in (sheet.data or sheet.lines)],
            }
            for sheet in [*_sheets(found, tables), sheets.trade_off(found)]
        },
        "again": {one.file: list(one.commands) for one in again(found)},
    }
    return json.dumps(_finite(everything), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: both become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
