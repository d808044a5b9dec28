"""
What unequal clients, ranks that change and the field's optimizers come to, from finished sweeps.

usage: python scripts/unequal.py runs/unequal docs/unequal-study

Every folder in the first is a run of ``fedllm sweep experiments/unequal/<name>.toml``; the first
point of each is what its others are compared with, seed by seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from grids import (
    Column,
    Line,
    column,
    command,
    gain,
    gaps,
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
    """Accuracy of each line with its spread, and bytes as parts of the first line's."""
    sizes = [len(some) for some in found.values()]
    figure = Figure(figsize=(8, 0.34 * sum(sizes) + 0.8 * len(sizes)), layout="constrained")
    panels = figure.subplots(len(found), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for axes, (grid, some) in zip(panels, found.items(), strict=True):
        for place, line in enumerate(some):
            values = [100 * value for value in line.server]
            axes.errorbar(
                statistics.fmean(values), place, capsize=3, fmt="o",
                xerr=statistics.stdev(values) if len(values) > 1 else 0,
                color="C0" if place else "#555555",
            )  # fmt: skip
            axes.annotate(
                f"{line.bytes / some[0].bytes:.2f} x bytes", (1.01, place), fontsize=7,
                xycoords=("axes fraction", "data"), va="center",
            )  # fmt: skip
        axes.axvline(100 * statistics.fmean(some[0].server), color="#888888", linewidth=0.8)
        axes.set_yticks(range(len(some)), [line.label for line in some], fontsize=8)
        axes.set_ylim(len(some) - 0.5, -0.5)
        axes.set_title(GRIDS[grid], fontsize=9, loc="left")
        axes.grid(True, axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("accuracy, %")
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
        "![accuracy of each line](accuracy.svg)", "",
        "Bars: the spread over the seeds. The line: the first one's mean.", "",
        "## What the catalogue expects", "",
        tables.markdown(["expected", "here", "by"], verdicts(found)), "",
    ])  # fmt: skip


def write(found: dict[str, list[Line]], runs: Path, out: Path) -> None:
    """The page, its picture and its numbers."""
    draw(found, out / "accuracy.svg")
    write_csv(found, out / "study.csv")
    (out / "README.md").write_text(page(found))


if __name__ == "__main__":
    command(__doc__, "unequal", GRIDS, write)
