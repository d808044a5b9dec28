"""
What each block of knowledge costs and gives, from finished sweeps: one table, one picture.

usage: python scripts/knowledge.py runs/knowledge docs/knowledge-study

Every folder in the first is a run of ``fedllm sweep experiments/knowledge/<name>.toml``; the first
point of each is what its others are compared with, seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from grids import (
    Line,
    column,
    command,
    gain,
    gaps,
    lines,
    scatter,
    spread,
    table,
    times,
    verdict,
    write_csv,
)
from matplotlib.figure import Figure

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
COLUMNS = (
    column("server, %", "server"), column("clients, %", "clients"),
    gain("server's gain", "server"), gain("clients' gain", "clients"),
    times("bytes", "bytes"), times("FLOPs", "flops", lambda value: f"{value / 1e9:,.0f} G"),
)  # fmt: skip


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
        if "payload change" in line.label:
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


def draw(found: Mapping[str, list[Line]], path: Path) -> None:
    """The server's accuracy against bytes of a client and round; dashed: the front."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, grids) in zip(panels, PANELS.items(), strict=True):
        some = [(grid, line) for grid in grids for line in found.get(grid, [])]
        scatter(axes, [replace(line, label=f"{grid}: {line.label}") for grid, line in some], TICKS,
                markers=["os^Dvp*"[grids.index(grid)] for grid, _ in some])  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("kB of a client and round")
    panels[0].set_ylabel("server's accuracy, %")
    figure.savefig(path, metadata={"Date": None})


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
        table(found, GRIDS, COLUMNS), "",
    ]  # fmt: skip
    if alone:
        said = ", ".join(f"{line.label}: {spread(line.clients)} %" for line in alone)
        parts += [f"Clients alone, the same data and rounds: {said}.", ""]
    parts += ["![the server's accuracy against bytes](front.svg)", "",
              "Dashed: the front, than which nothing here is both cheaper and better.", "",
              "## What the catalogue expects", "",
              tables.markdown(["expected", "here", "by"], verdicts(found, alone)), ""]  # fmt: skip
    return "\n".join(parts)


def write(found: dict[str, list[Line]], runs: Path, out: Path) -> None:
    """The page, its picture and its numbers."""
    alone = lines(runs / ALONE)
    draw(found, out / "front.svg")
    write_csv({**found, **({ALONE: alone} if alone else {})}, out / "study.csv")
    (out / "README.md").write_text(page(found, alone))


if __name__ == "__main__":
    command(__doc__, "knowledge", GRIDS, write)
