"""report.html: one self-contained page, drawn from the files of runs; needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from fedllm import __version__
from fedllm.report import joint, plots, sheets
from fedllm.report.again import Again, again
from fedllm.report.gather import Gathered, gather
from fedllm.report.tables import Sheet

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --dim: #5c6670; --paper: #fff; --card: #f6f7f8;
  --line: #dfe3e6; --warn: #b36b00; --link: #1f5f99; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e6; --dim: #9aa4ad; --paper: #16181a;
  --card: #1f2326; --line: #363c41; --warn: #f0ad4e; --link: #86bdf0; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: var(--ink);
  background: var(--paper); }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
h2 a, figcaption a { font-size: .8rem; font-weight: normal; margin-left: .6rem; }
a { color: var(--link); }
p { margin: .4rem 0; overflow-wrap: anywhere; } .dim { color: var(--dim); font-size: .875rem; }
.note { border-left: 3px solid var(--warn); padding: .1rem 0 .1rem .7rem; margin: .6rem 0; }
.note ul { margin: .2rem 0; padding-left: 1.2rem; font-size: .875rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem;
  min-width: 100%; }
th, td { padding: .3rem .65rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { background: var(--card); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
th:first-child { background: var(--card); }
td.text, th.text { text-align: left; } td.why { white-space: normal; min-width: 14rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 1rem 1.5rem; align-items: start; margin-top: 1.6rem; }
.grid h2 { margin-top: .6rem; } .grid > * { min-width: 0; }
figure { margin: 0 0 1rem; padding: .7rem; background: var(--card); border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: .4rem; }
figure svg { display: block; width: 100%; max-width: 540px; height: auto; margin: 0 auto; }
figure svg text { fill: currentColor; }
pre { overflow-x: auto; padding: .8rem; background: var(--card); border-radius: 8px;
  font-size: .8rem; }
summary { cursor: pointer; margin: .4rem 0; overflow-wrap: anywhere; }
@media (max-width: 600px) { main { padding: 1rem .7rem 2rem; } body { font-size: 14px; }
  th, td { padding: .28rem .5rem; } th:first-child, td:first-child { max-width: 9.5rem;
  min-width: 6.2rem; white-space: normal; } }
@media print { .wide { overflow: visible; } }
"""
_TEXT = ("model", "variant", "direction", "role", "client", "step", "why", "rounds")
FOLDED = 12  # more settings than these are shown on demand
_RELOAD = '<meta http-equiv="refresh" content="5">'


def write(folder: Path) -> Path:
    """Draw ``folder/report.html`` from the files of a finished run, comparison or sweep."""
    found = gather([folder])
    return save(folder / "report.html", render(found, warnings=joint.refuse(found)))


def save(target: Path, text: str | bytes) -> Path:
    """Write whole or not at all."""
    aside = target.with_name(f"{target.name}.part")
    try:
        aside.write_bytes(text if isinstance(text, bytes) else text.encode())
        aside.replace(target)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return target


def render(
    found: Gathered, tables: Sequence[Sheet] = (), warnings: Sequence[str] = (),
    live: bool = False,
) -> str:  # fmt: skip
    """
    The page as text. tables: of budgets and targets.  warnings: what makes the comparison unfair.

    live: a browser loads it again every few seconds.
    """
    settings = sheets.settings(found.entries)
    parts = [
        _head(found, warnings),
        _sheet(sheets.closing(found)),
        *(_sheet(table) for table in tables),
        _figures(found),
        _sheet(sheets.roles(found.entries)),
        _sheet(sheets.clients(found)),
        _sheet(sheets.client_costs(found.entries), folded=True),
        _sheet(sheets.server(found.entries)),
        _sheet(sheets.products(found.entries), folded=True),
        _sheet(sheets.faults(found.entries)),
        _sheet(settings, folded=len(settings.lines) > FOLDED),
        _again(again(found)),
        "<h2>Data of this page</h2><details><summary>summary.json</summary>"
        f'<pre id="summary">{html.escape(json.dumps(found.summary, indent=1))}</pre></details>',
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{_RELOAD if live else ''}<title>{html.escape(found.title)} - fedllm</title>"
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(found: Gathered, warnings: Sequence[str]) -> str:
    summary = found.summary
    runs = summary.get("parts") or {"": summary}
    flags = sorted({flag for run in runs.values() for flag in run["flags"]})
    seeds = summary.get("seeds") or [summary["seed"]]
    said = (
        f"{summary['model'].rsplit('/', 1)[-1]}, {summary['tunables']}, {summary['rounds']} rounds,"
        f" seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; fedllm {__version__}"
    )
    notes = "".join(f'<p class="note">{html.escape(flag)}</p>' for flag in flags)
    head = f'<h1>{html.escape(found.title)}</h1><p class="dim">{html.escape(said)}</p>'
    return f"{head}{_unfair(warnings)}{notes}"


def _unfair(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    listed = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings)
    return f'<div class="note"><strong>Not like for like:</strong><ul>{listed}</ul></div>'


def _csv(file: str, text: str, kind: str = "csv", said: str = "CSV") -> str:
    return (
        f'<a download="{html.escape(file)}" '
        f'href="data:text/{kind};charset=utf-8,{quote(text)}">{html.escape(said)}</a>'
    )


def _figures(found: Gathered) -> str:
    """Curves over bytes by role, and beside them what quality costs."""
    left, right = [], []
    if picture := plots.quality(found.summary):
        title = "Quality over rounds" + (
            ", mean ± standard deviation of seeds" if len(found.summary.get("seeds", [0])) > 1
            else ""
        )  # fmt: skip
        left.append(_figure(title, picture, sheets.curves(found)))
    sent = sheets.roles(found.entries)
    if picture := plots.roles([(run, way, role, size) for run, way, role, size in sent.data]):
        left.append(_figure("Bytes by direction and role", picture, replace(sent, name="sent")))
    if found.summary.get("parts") and sheets.trade_off(found).data:
        picture = plots.trade_off(found.summary, "bytes", "flops")
        right.append(_figure("Quality against cost", picture, sheets.trade_off(found)))
    columns = "".join(f"<div>{''.join(column)}</div>" for column in (left, right) if column)
    return f'<div class="grid">{columns}</div>' if columns else ""


def _figure(title: str, picture: str, data: Sheet) -> str:
    link = _csv(f"{data.name}.csv", data.csv())
    caption = f"<figcaption>{html.escape(title)} {link}</figcaption>"
    return f'<figure id="{data.name}">{caption}{picture}</figure>'


def _sheet(found: Sheet, folded: bool = False) -> str:
    """A table with its title and CSV; nothing where there are no lines."""
    if not found.lines:
        return ""
    link = _csv(f"{found.name}.csv", found.csv())
    note = f'<p class="dim">{html.escape(found.note)}</p>' if found.note else ""
    table = _table(found)
    if not found.title:
        under = f'<p class="dim">{html.escape(found.note)} {link}</p>'
        return f'<div id="{found.name}">{table}{under}</div>'
    head = f"<h2>{html.escape(found.title)} {link}</h2>"
    if folded:
        table = f"<details><summary>{len(found.lines)} lines</summary>{table}</details>"
    return f'<section id="{found.name}">{head}{table}{note}</section>'


def _table(found: Sheet) -> str:
    kinds = ["why" if name == "why" else "text" if name in _TEXT else "" for name in found.header]
    head = "".join(
        f"<th{_class(kind)}>{html.escape(cell)}</th>"
        for cell, kind in zip(found.header, kinds, strict=True)
    )
    rows = []
    for line in found.lines:
        cells = "".join(
            f"<td{_class(kind)}>{html.escape(str(cell))}</td>"
            for cell, kind in zip(line, kinds, strict=True)
        )
        rows.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _class(kind: str) -> str:
    return {"": "", "text": ' class="text"', "why": ' class="text why"'}[kind]


def _again(made: Sequence[Again]) -> str:
    """How to run it once more: the files to save, and the commands beside them."""
    if not made:
        return ""
    links = " ".join(_csv(one.file, one.text, "plain", one.file) for one in made)
    commands = "\n".join(command for one in made for command in one.commands)
    texts = "".join(
        f"<details><summary>{html.escape(one.file)}</summary>"
        f"<pre>{html.escape(one.text)}</pre></details>"
        for one in made
    )
    return (
        f"<h2>The same again</h2><p>Save {links}, with every default written out; then</p>"
        f'<pre id="again">{html.escape(commands)}</pre>{texts}'
    )
