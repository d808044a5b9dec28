"""
What unequal clients, ranks that change and the field's optimizers come to, from finished sweeps.

usage: python scripts/unequal.py runs/unequal docs/unequal-study

Every folder in the first is a run of ``fedllm sweep experiments/unequal/<name>.toml``; the first
point of each is what its others are compared with, seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from grids import (
    Column,
    Line,
    column,
    command,
    gain,
    gaps,
    scatter,
    table,
    times,
    verdict,
    write_csv,
)  # fmt: skip
from matplotlib.figure import Figure

from fedllm.report import tables

GRIDS = {  # of the table, in its order
    "rules": "Ranks 2, 4, 8, 16, 32 over five clients (P-06 to P-09, P-14)",
    "modules": "LoRA around modules of their own",
    "schedule": "Ranks that change over the rounds (P-10)",
    "optimizers": "Optimizers (P-30)",
    "slora": "Single weights first, then LoRA (P-13)",
    "balance": "Two of five clients' labels are shuffled (P-07)",
    "inside": "Blocks split inside (S-04)",
}
EXPECTED = {  # grid: what the catalogue expects of the later lines with the one word and
    # without the other, against the first
    "rules": ("P-06 to P-09: better than filling up with zeros", "aggregation", "ranks none"),
    "optimizers": ("P-30: better than FedAvg where labels are skewed", "", "-"),
    "slora": ("P-13: better than LoRA alone where labels are skewed", "sparse", "-"),
    "balance": ("P-07: better than FedAvg beside clients of shuffled labels", "balance", "-"),
}
TICKS = (50, 100, 200, 400, 800)  # kB


def _number(show: str, of: str, title: str) -> Column:
    """A value as it is; a dash where there is none."""
    return (
        title,
        lambda line, _: (
            "-" if getattr(line, of) != getattr(line, of) else f"{getattr(line, of):{show}}"
        ),
    )


COLUMNS = (
    column("accuracy, %", "server"), gain("gain", "server"), times("bytes", "bytes"),
    times("FLOPs", "flops", lambda value: f"{value / 1e9:,.0f} G"),
    _number(".3f", "seconds", "server, s"), _number(".2f", "gap", "product gap"),
)  # fmt: skip


def verdicts(found: Mapping[str, list[Line]]) -> list[list[str]]:
    """What was expected of each line beside what was measured."""
    return [
        verdict(f"{expected}: {line.label}", gaps(line.server, found[grid][0].server))
        for grid, (expected, word, but) in EXPECTED.items()
        for line in found.get(grid, [])[1:]
        if word in line.label and but not in line.label
    ]


def draw(found: Mapping[str, list[Line]], path: Path) -> None:
    """Accuracy against bytes of a client and round; dashed: the front."""
    wide = min(len(found), 2)
    high = -(-len(found) // wide)
    figure = Figure(figsize=(7 * wide, 5 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).flat
    for axes, (grid, some) in zip(panels, found.items(), strict=False):
        scatter(axes, some, TICKS)
        axes.set_title(GRIDS[grid], fontsize=9)
        axes.set_xlabel("kB of a client and round")
        axes.set_ylabel("accuracy, %")
    for axes in list(figure.axes)[len(found) :]:
        axes.remove()
    figure.savefig(path, metadata={"Date": None})


def page(found: Mapping[str, list[Line]]) -> str:
    """README.md of the study."""
    return "\n".join([
        "# What becomes of unequal clients", "",
        "Made by `make unequal` (`fedllm sweep experiments/unequal/<name>.toml`, then",
        "`scripts/unequal.py`): MiniLM (22.7 M, real weights) with LoRA in its last blocks,",
        "Banking77, clients with 1,000 rows each, five rounds (single weights first: ten; shuffled",
        "labels: eight). Accuracy on the test rows after the last round, mean and standard",
        "deviation over the seeds; the gain is over the first line of each block, seed by seed, in",
        "points; bytes (both ways) and FLOPs are the mean of a client and round, seconds the",
        "server's for a round's aggregation. The product gap is how far the new B A lies from the",
        "mean of the clients' B A, relative, in the last round.", "",
        table(found, GRIDS, COLUMNS), "",
        "![accuracy against bytes](front.svg)", "",
        "Dashed: the front, than which nothing here is both cheaper and better.", "",
        "## What the catalogue expects", "",
        tables.markdown(["expected", "here", "by"], verdicts(found)), "",
    ])  # fmt: skip


def write(found: dict[str, list[Line]], runs: Path, out: Path) -> None:
    """The page, its picture and its numbers."""
    draw(found, out / "front.svg")
    write_csv(found, out / "study.csv")
    (out / "README.md").write_text(page(found))


if __name__ == "__main__":
    command(__doc__, "unequal", GRIDS, write)
