"""
What each codec saves and costs, from finished sweeps: a table and a picture for each payload.

usage: python scripts/messages.py runs/small-messages docs/messages-study

Every folder in the first is a run of ``fedllm sweep experiments/small-messages/<name>.toml``; the
first point of each sends float32, and the others are compared with it, seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from grids import (
    Line,
    column,
    command,
    front,
    gain,
    gaps,
    scatter,
    spread,
    table,
    times,
    write_csv,
)  # fmt: skip
from matplotlib.figure import Figure

from fedllm.report import tables

GRIDS = {  # of the table, in its order
    "parameters": "Updates of parameters (P-05)",
    "logits": "Logits of the public rows, both ways (K-07)",
    "activations": "Hidden states and their gradients (S-07)",
    "tokens": "Half of the tokens (S-06)",
}
DRAWN = {  # grid: the cost that its codecs have a say in
    "parameters": "up", "logits": "bytes", "activations": "bytes",
}  # fmt: skip
TICKS = {
    "parameters": (10, 20, 50, 100, 200, 400),
    "logits": (10, 20, 50, 100, 200, 400),
    "activations": (1, 2, 5, 10, 20, 50),
}
UNITS = {"parameters": (1e3, "kB"), "logits": (1e3, "kB"), "activations": (1e6, "MB")}
WAY = {"up": "sent by a client in a round", "bytes": "of a client and round, both ways"}
SENT = {"up": "up", "bytes": "both ways"}
TIMES, POINTS = 8, 1.0  # as many times fewer bytes, for at most so many points
COLUMNS = (
    column("accuracy, %", "server"), gain("gain", "server"), times("up", "up"),
    times("down", "down"),
)  # fmt: skip


def verdicts(found: Mapping[str, list[Line]]) -> list[list[str]]:
    """The best line of each payload that sends at most an eighth."""
    listed = []
    for grid, of in (*DRAWN.items(), ("parameters", "bytes")):
        some = found.get(grid, [])
        small = [line for line in some
                 if getattr(line, of) * TIMES <= getattr(some[0], of)]  # fmt: skip
        for line in sorted(small, key=lambda line: -statistics.fmean(line.server))[:1]:
            gap = gaps(line.server, some[0].server)
            holds = 100 * statistics.fmean(gap) >= -POINTS
            listed.append([
                f"{grid}: {line.label}", "holds" if holds else "**does not hold**",
                f"{getattr(some[0], of) / getattr(line, of):.1f} times fewer {SENT[of]}",
                f"{spread(gap, '+.1f')} points",
            ])  # fmt: skip
    return listed


def draw(grid: str, some: list[Line], path: Path) -> None:
    """Accuracy against bytes; dashed: the front."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    (unit, name), of = UNITS[grid], DRAWN[grid]
    scatter(axes, some, TICKS[grid], unit, of)
    axes.set_title(GRIDS[grid], fontsize=10)
    axes.set_xlabel(f"{name} {WAY[of]}")
    axes.set_ylabel("accuracy, %")
    figure.savefig(path, metadata={"Date": None})


def page(found: Mapping[str, list[Line]]) -> str:
    """README.md of the study."""
    parts = [
        "# What small messages cost", "",
        "Made by `make messages` (`fedllm sweep experiments/small-messages/<name>.toml`, then",
        "`scripts/messages.py`): MiniLM (22.7 M, real weights), Banking77, four clients with 1,000",
        "rows each (Dirichlet 0.3 over the labels), five rounds. Accuracy on the test rows after",
        "the last round, mean and standard deviation over the seeds; the gain is over the first",
        "line of each block, which sends float32, seed by seed, in points. Bytes are whole frames",
        "of a client and round. fp16 alters the fourth digit only: what it gains or loses is what",
        "training makes of any rounding, and a gain of that size says nothing of a codec.", "",
        table(found, GRIDS, COLUMNS), "",
        f"## At most {POINTS:g} point for {TIMES} times fewer bytes", "",
        "Of each payload the best line that sends at most an eighth of the first:", "",
        tables.markdown(["", "", "bytes", "gain"], verdicts(found)), "",
    ]  # fmt: skip
    for grid in DRAWN:
        if grid in found:
            best = ", ".join(line.label for line in front(found[grid], DRAWN[grid]))
            parts += [f"![{grid}: accuracy against bytes]({grid}.svg)", "",
                      f"Dashed: the front. On it: {best}.", ""]  # fmt: skip
    return "\n".join(parts)


def write(found: dict[str, list[Line]], runs: Path, out: Path) -> None:
    """The page, its pictures and its numbers."""
    for grid in DRAWN:
        if grid in found:
            draw(grid, found[grid], out / f"{grid}.svg")
    write_csv(found, out / "study.csv")
    (out / "README.md").write_text(page(found))


if __name__ == "__main__":
    command(__doc__, "messages", GRIDS, write)
