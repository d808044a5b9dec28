"""report.html: one self-contained page, drawn from the files of a run; needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm import __version__
from fedllm.compare import read
from fedllm.report import plots, tables

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#222, #ddd); background: light-dark(#fff, #181a1b); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid light-dark(#ddd, #444); }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { overflow-x: auto; padding: .8rem; background: light-dark(#f4f4f4, #242628); }
.note { border-left: 3px solid #d90; padding-left: .7rem; }
"""


def write(folder: Path) -> Path:
    """Draw ``folder/report.html`` from ``summary.json`` and ``experiment.toml``."""
    target = folder / "report.html"
    aside = folder / "report.part"
    aside.write_text(render(read(folder), _text(folder / "experiment.toml")), encoding="utf-8")
    aside.replace(target)
    return target


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in line) + "</tr>"
        for line in lines
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _clients(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Each client's quality, in each run (first seed)."""
    key, title = plots.PRIMARY[summary["task"]]
    factor = 100 if key == "accuracy" else 1
    runs = summary.get("parts") or {summary["strategy"]: summary}
    found = {
        name: (run["clients"][0] if "parts" in summary else run["clients"])
        for name, run in runs.items()
        if not run.get("same_as")
    }
    names = sorted({client for clients in found.values() for client in clients})
    lines = []
    for run, clients in found.items():
        cells = [
            f"{clients[c][key] * factor:.{1 if factor == 100 else 3}f}" if c in clients else ""
            for c in names
        ]
        lines.append([run, title, *cells])
    return ["run", "measure", *names], lines


def _roles(summary: dict[str, Any]) -> str:
    runs = summary.get("parts") or {summary["strategy"]: summary}
    steps = [
        [name, run["variant"], *(f"{client}: {count}" for client, count in
                                 run.get("optimizer_steps", {}).items())]
        for name, run in runs.items()
        if run.get("optimizer_steps")
    ]  # fmt: skip
    if not steps:
        return ""
    width = max(len(line) for line in steps)
    lines = [line + [""] * (width - len(line)) for line in steps]
    return "<h2>Optimizer steps</h2>" + _table(["run", "variant", *[""] * (width - 2)], lines)


def render(summary: dict[str, Any], experiment: str) -> str:
    """The page as text."""
    header, lines = tables.rows(summary)
    runs = summary.get("parts") or {"": summary}
    flags = sorted({flag for run in runs.values() for flag in run["flags"]})
    pictures = [plots.quality(summary)]
    if summary.get("parts"):
        pictures.append(plots.trade_off(summary))
    seeds = summary.get("seeds") or [summary["seed"]]
    parts = [
        f"<h1>{html.escape(summary['name'])}</h1>",
        f"<p>{html.escape(summary['model'].rsplit('/', 1)[-1])}, "
        f"{html.escape(summary['tunables'])}, {summary['rounds']} rounds, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; "
        f"fedllm {__version__}</p>",
        *(f'<p class="note">{html.escape(flag)}</p>' for flag in flags),
        _table(header, lines),
        "<p>Costs are means per client and round, evaluation left out; memory is the peak of "
        "live tensors. Quality is of the last round.</p>",
        f'<div class="plots">{"".join(pictures)}</div>',
        "<h2>Clients</h2>",
        _table(*_clients(summary)),
        _roles(summary),
        f"<h2>Experiment</h2><pre>{html.escape(experiment)}</pre>",
        "<h2>Data of this page</h2><details><summary>summary.json</summary><pre>"
        + html.escape(json.dumps(summary, indent=1))
        + "</pre></details>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(summary['name'])} - fedllm</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
