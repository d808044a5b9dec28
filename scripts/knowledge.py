"""
What each block of knowledge costs and gives, from finished sweeps: one table, one picture.

usage: python scripts/knowledge.py runs/knowledge docs/knowledge-study

Every folder in the first is a run of ``fedllm sweep experiments/knowledge/<name>.toml``; the first
point of each is what its others are compared with, seed by seed.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedllm import experiment as ex
from fedllm import sweep
from fedllm.compare import read
from fedllm.errors import FedllmError
from fedllm.report import tables

GRIDS = {  # of the table, in its order
    "depth": "Clients of two, four and six blocks (K-01)",
    "selection": "Whose word counts (K-11, K-12)",
    "forms": "What is said of a row (K-07, K-08, K-09)",
    "features": "Hidden states instead of logits (K-05)",
    "pruning": "A quarter of the public rows (K-10)",
    "feedback": "Public rows that resemble the clients' (K-06)",
    "clusters": "Taught by those who think alike (K-13)",
    "fedmd": "Without a model at the server (K-04)",
    "fedkd": "A private mentor (K-03)",
}
ALONE = "alone"
PANELS = {  # of the picture: runs that differ in nothing else than what their lines say
    "public rows without labels": ("forms",),
    "with labels": ("selection", "features", "pruning"),
}
TICKS = (10, 20, 50, 100, 200, 400)  # kB


@dataclass(frozen=True)
class Line:
    """One point of a grid: what it sets, and one value a seed; NaN where there is no model."""

    label: str
    seeds: tuple[int, ...]
    server: tuple[float, ...]
    clients: tuple[float, ...]
    bytes: float
    flops: float


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(map(_word, value.values())) or "none"
    return str(value).lower() if isinstance(value, bool) else Path(str(value)).name


def _label(settings: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """What a point sets otherwise than the first; the first: its first setting."""
    other = {key: value for key, value in settings.items() if value != plain[key]}
    first = next(iter(settings))
    shown = other or {first: settings[first]}
    return ", ".join(f"{key.rpartition('.')[2]} {_word(value)}" for key, value in shown.items())


def _quality(run: Mapping[str, Any], of: str) -> float:
    found = run.get(of)
    return float(found["accuracy"]) if found else float("nan")


def lines(folder: Path) -> list[Line]:
    """
    The points of a sweep, in the order of its file; none unless the first is there.

    Only of seeds that all points have that were run: a mean over other seeds compares nothing.
    """
    path = folder / "experiment.toml"
    if not path.exists():
        return []
    points = sweep.points(ex.load(path))
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for point in points:
        there = [read(p.parent) for p in (folder / point.name).glob("seed-*/summary.json")]
        if there:
            runs[point.name] = {int(run["seed"]): run for run in there}
    if points[0].name not in runs:
        return []
    shared = sorted(set.intersection(*map(set, runs.values())))
    return [_line(point, [runs[point.name][seed] for seed in shared], points[0])
            for point in points if shared and point.name in runs]  # fmt: skip


def _line(point: sweep.Point, runs: Sequence[Mapping[str, Any]], first: sweep.Point) -> Line:
    costs = [run["per_client_round"] for run in runs]
    return Line(
        _label(point.settings, first.settings),
        tuple(int(run["seed"]) for run in runs),
        tuple(_quality(run, "global") for run in runs),
        tuple(_quality(run, "mean") for run in runs),
        statistics.fmean(cost["bytes_up"] + cost["bytes_down"] for cost in costs),
        statistics.fmean(cost["flops"] for cost in costs),
    )


def spread(values: Sequence[float], show: str = ".1f") -> str:
    """Mean and standard deviation in points; a dash where there is none."""
    if any(value != value for value in values):
        return "-"
    mean = f"{100 * statistics.fmean(values):{show}}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def gaps(mine: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """By how much mine is better, seed by seed."""
    return tuple(a - b for a, b in zip(mine, other, strict=True))


def table(found: Mapping[str, list[Line]]) -> str:
    """All grids, one block of lines each."""
    listed = []
    for grid, some in found.items():
        plain = some[0]
        seeds = ", ".join(map(str, plain.seeds))
        listed.append([f"**{GRIDS[grid]}**, seeds {seeds}", *[""] * 6])
        for line in some:
            first = line is plain
            listed.append([
                line.label, spread(line.server), spread(line.clients),
                "" if first else spread(gaps(line.server, plain.server), "+.1f"),
                "" if first else spread(gaps(line.clients, plain.clients), "+.1f"),
                tables.size(line.bytes) if first else f"{line.bytes / plain.bytes:.2f} x",
                f"{line.flops / 1e9:,.0f} G" if first else f"{line.flops / plain.flops:.2f} x",
            ])  # fmt: skip
    return tables.markdown(
        ["", "server, %", "clients, %", "server's gain", "clients' gain", "bytes", "FLOPs"], listed
    )


def verdict(what: str, gap: Sequence[float]) -> list[str]:
    """A claim of the catalogue beside what was measured."""
    mean = statistics.fmean(gap)
    noise = statistics.stdev(gap) if len(gap) > 1 else float("inf")
    holds = "holds" if mean > 0 else "**does not hold**"
    if abs(mean) <= noise:
        holds += ", within the spread of the seeds" if len(gap) > 1 else ", one seed"
    return [what, holds, f"{spread(gap, '+.1f')} points, {sum(g > 0 for g in gap)} of {len(gap)}"]


def verdicts(found: Mapping[str, list[Line]], alone: Sequence[Line]) -> list[list[str]]:
    """The catalogue's comparisons of quality, as far as their runs are there."""
    listed = []

    def add(what: str, grid: str, label: str, who: str = "server") -> None:
        for line in found.get(grid, []):
            if line.label == label:
                gap = gaps(getattr(line, who), getattr(found[grid][0], who))
                listed.append(verdict(what, gap))

    add("K-01: FedMKT's selection better than the plain mean", "depth",
        "knowledge least-loss, selective true")  # fmt: skip
    for line in found.get("pruning", [])[1:]:
        if line.label.startswith("choose"):
            gap = gaps(line.server, found["pruning"][0].server)
            listed.append(verdict(f"K-10: {line.label} better than random", gap))
    add("K-06: rows by the clients' labels better than random", "feedback",
        "choose feedback")  # fmt: skip
    add("K-13: two clusters better than one consensus, for clients", "clusters", "clusters 2",
        "clients")  # fmt: skip
    for line in found.get("fedkd", []):
        if line.label.startswith("strategy parameters+change"):
            gap = gaps(line.clients, found["fedkd"][0].clients)
            listed.append(verdict("K-03: mentors better than alone", gap))
    said = [line for line in found.get("forms", []) if line.label == "form statistics"]
    compared = {
        "K-04: FedMD": found.get("fedmd", [])[:1],
        "K-09: the likeliest class and its probability": said,
        "Logits": found.get("forms", [])[:1],
    }
    for title, some in compared.items():
        for line in some:
            if alone and alone[0].seeds == line.seeds:
                gap = gaps(line.clients, alone[0].clients)
                listed.append(verdict(f"{title} better than no knowledge, for clients", gap))
    return listed


def front(some: Sequence[Line]) -> list[Line]:
    """Those than which no other is both cheaper and better, the cheapest first."""
    found: list[Line] = []
    for line in sorted(some, key=lambda line: (line.bytes, -statistics.fmean(line.server))):
        if not found or statistics.fmean(line.server) > statistics.fmean(found[-1].server):
            found.append(line)
    return found


def draw(found: Mapping[str, list[Line]], path: Path) -> None:
    """The server's accuracy against bytes of a client and round; dashed: the front."""
    shown = {
        title: [(grid, line) for grid in grids for line in found.get(grid, [])]
        for title, grids in PANELS.items()
    }
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, some) in zip(panels, shown.items(), strict=True):
        best = front([line for _, line in some])
        axes.plot([line.bytes / 1e3 for line in best],
                  [100 * statistics.fmean(line.server) for line in best],
                  color="#888888", linestyle="--", linewidth=1, drawstyle="steps-post")  # fmt: skip
        grids = list(dict.fromkeys(grid for grid, _ in some))
        for number, (grid, line) in enumerate(some):
            values = [100 * value for value in line.server]
            axes.errorbar(
                line.bytes / 1e3, statistics.fmean(values),
                statistics.stdev(values) if len(values) > 1 else 0,
                color=f"C{number % 10}", marker="os^Dvp*"[grids.index(grid)], markersize=5,
                capsize=3, linestyle="none", label=f"{grid}: {line.label}",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(TICKS[0], 1.3 * TICKS[-1])
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("kB of a client and round")
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if some:
            axes.legend(fontsize=7, frameon=False, loc="upper center", ncols=2,
                        bbox_to_anchor=(0.5, -0.13))  # fmt: skip
    panels[0].set_ylabel("server's accuracy, %")
    figure.savefig(path, metadata={"Date": None})


def write_csv(found: Mapping[str, list[Line]], path: Path) -> None:
    """Every point and seed, for whoever draws it otherwise."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["grid", "point", "seed", "server", "clients", "bytes", "client FLOPs"])
        for grid, some in found.items():
            for line in some:
                for seed, server, clients in zip(
                    line.seeds, line.server, line.clients, strict=True
                ):
                    writer.writerow([grid, line.label, seed, server, clients, round(line.bytes),
                                     round(line.flops)])  # fmt: skip


def page(found: Mapping[str, list[Line]], alone: Sequence[Line]) -> str:
    """README.md of the study."""
    parts = [
        "# What each block of knowledge costs and gives", "",
        "Made by `make knowledge` (`fedllm sweep experiments/knowledge/<name>.toml`, then",
        "`scripts/knowledge.py`): MiniLM (22.7 M, real weights), Banking77, clients with 1,000",
        "rows each (Dirichlet 0.3 over the labels), 625 public rows, five rounds. Accuracy on the",
        "test rows after the last round, mean and standard deviation over the seeds (none where",
        "there is one); the gains are over the first line of each block, seed by seed, in points;",
        "bytes (both ways) and FLOPs are of a client and round. The settings were fixed before the",
        "first run.", "",
        table(found), "",
    ]  # fmt: skip
    if alone:
        said = ", ".join(f"{line.label}: {spread(line.clients)} %" for line in alone)
        parts += [f"Clients alone, the same data and rounds: {said}.", ""]
    parts += ["![the server's accuracy against bytes](front.svg)", "",
              "Dashed: the front, than which nothing here is both cheaper and better.", "",
              "## What the catalogue expects", "",
              tables.markdown(["expected", "here", "by"], verdicts(found, alone)), ""]  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    """Read what is there and write the page."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = {grid: lines(runs / grid) for grid in GRIDS}
    found = {grid: some for grid, some in found.items() if some}
    if not found:
        raise FedllmError(f"{runs}: no finished runs here; 'make knowledge' makes them")
    alone = lines(runs / ALONE)
    out.mkdir(parents=True, exist_ok=True)
    draw(found, out / "front.svg")
    write_csv({**found, **({ALONE: alone} if alone else {})}, out / "study.csv")
    (out / "README.md").write_text(page(found, alone))


if __name__ == "__main__":
    try:
        main()
    except FedllmError as error:
        sys.exit(f"error: {error}")
