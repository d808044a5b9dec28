"""
The paper's case study from finished sweeps: figures 3 and 4, table I, and its seven trends.

usage: python scripts/study.py runs/study docs/study

Reads ``rank``, ``public``, ``samples`` and ``bounds`` in the first folder, as far as they are
there (each is a run of ``fedllm sweep experiments/study/<name>.toml``), and writes README.md,
pictures and a table into the second.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedllm import experiment as ex
from fedllm.compare import read
from fedllm.errors import FedllmError
from fedllm.report import tables

GRIDS = {
    "rank": ("tunables.rank", "LoRA rank", "parameters", "#4477aa"),
    "public": ("public.size", "public rows", "logits", "#cc6677"),
    "samples": ("simulation.examples", "training rows a client", "activations", "#228833"),
}
PAPER = {  # stars of table I: accuracy, communication (classification), client computation
    "parameters": (5, 3, 4), "logits": (3, 2, 5), "activations": (4, 4, 3),
}  # fmt: skip
PAD = 80
FLOAT = 4


@dataclass(frozen=True)
class Point:
    """One value of a grid: every seed's accuracy, and the costs of a client and round."""

    value: int
    scaled: bool
    accuracies: tuple[float, ...]
    up: float
    down: float
    flops: float
    roles: dict[str, float]
    seeds: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    @property
    def bytes(self) -> float:
        return self.up + self.down


def points(folder: Path, key: str) -> list[Point]:
    """
    The points of a sweep, as far as their runs are complete.

    Only of seeds that all of them have: a mean over other seeds compares nothing.
    """
    runs = {
        path: {run["seed"]: run for one in path.glob("seed-*/summary.json")
               for run in [read(one.parent)]}
        for path in sorted(folder.glob("*=*"))
    }  # fmt: skip
    runs = {path: there for path, there in runs.items() if there}
    shared = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    if not shared:
        return []
    found = [_point(path, [there[seed] for seed in shared], key) for path, there in runs.items()]
    return sorted(found, key=lambda p: (p.scaled, p.value))


def _point(path: Path, runs: Sequence[dict[str, Any]], key: str) -> Point:
    spec = ex.load(next(path.glob("seed-*/experiment.toml")))
    section, _, name = key.partition(".")
    value = int(getattr(getattr(spec, section), name))
    rank, alpha = getattr(spec.tunables, "rank", 1), getattr(spec.tunables, "alpha", 1.0)
    roles: dict[str, float] = {}
    for run in runs:
        clients = [cost for client, cost in run["costs"].items() if client != "server"]
        for cost in clients:
            for role, size in cost["payload_up"].items():
                roles[role] = roles.get(role, 0) + size / len(clients) / run["rounds"] / len(runs)
    mean = {name: statistics.fmean(run["per_client_round"][name] for run in runs)
            for name in ("bytes_up", "bytes_down", "flops")}  # fmt: skip
    return Point(
        value, key == "tunables.rank" and rank != 8 and alpha == 4 * rank,
        tuple(run["metrics"]["accuracy"] for run in runs),
        mean["bytes_up"], mean["bytes_down"], mean["flops"], roles,
        tuple(run["seed"] for run in runs),
    )  # fmt: skip


# trends -----------------------------------------------------------------------------------------


SLACK = 0.005  # of accuracy: a smaller fall from one value to the next is taken for none


def rises(listed: Sequence[Point]) -> tuple[bool, str]:
    """
    Whether the mean accuracy rises with the value.

    The last is better than the first by more than SLACK, none worse than the one before by more.
    """
    holds = listed[-1].accuracy - listed[0].accuracy > SLACK and all(
        a.accuracy - b.accuracy <= SLACK for a, b in itertools.pairwise(listed)
    )
    said = ", ".join(f"{p.value}: {p.accuracy:.1%} ± {p.spread:.1%}" for p in listed)
    return holds, said


LOWEST = 70  # percent, of the picture
APART = 0.2  # of accuracy, between two scales of one rank
NEARLY = 0.05  # rows differ in length, so no more is asked of what depends on them
FLAT = 0.25


def proportional(
    listed: Sequence[Point], of: Callable[[Point], float], tolerance: float, unit: str = "B"
) -> tuple[bool, str]:
    """
    Whether a cost grows like the value: cost / value the same everywhere, within tolerance.

    Says, too, what a line through the first and last point has where the value is 0.
    """
    rates = [of(point) / point.value for point in listed]
    worst = max(rates) / min(rates) - 1
    first, last = listed[0], listed[-1]
    slope = (of(last) - of(first)) / (last.value - first.value)
    start = of(first) - slope * first.value
    said = f"cost / value differs by {worst:.2%} at most"
    if worst > tolerance:
        said += f": {tables.amount('flops', start) if unit == 'FLOP' else tables.size(start)} plus "
        said += f"{slope / 1e6:,.1f} M{unit} each"
    return worst <= tolerance, said


def largest(what: str, mine: Sequence[Point], *others: Sequence[Point]) -> tuple[bool | None, str]:
    """Whether the last of mine costs more than all others; None where one is not measured yet."""
    ours = getattr(mine[-1], what)
    show = tables.size if what == "bytes" else lambda v: f"{v / 1e9:,.0f} GFLOP"
    said = f"{show(ours)} at {mine[-1].value}"
    if not all(others):
        return None, f"{said}; not every other grid is measured"
    most = max(getattr(p, what) for listed in others for p in listed)
    return ours > most, f"{said}, others at most {show(most)}"


def trends(found: dict[str, list[Point]]) -> list[tuple[str, str, str]]:
    """The paper's seven trends: (what it says, holds or not, our numbers)."""
    lines = []

    def add(what: str, holds: bool | None, said: str) -> None:
        verdict = {True: "holds", False: "**does not hold**", None: "open"}[holds]
        lines.append((what, verdict, said))

    rank = [p for p in found.get("rank", []) if not p.scaled]
    scaled = [p for p in found.get("rank", []) if p.scaled or p.value == 8]
    public, samples = found.get("public", []), found.get("samples", [])
    if len(rank) > 1:
        add("1. Parameters: accuracy rises with the rank (alpha fixed)", *rises(rank))
    if len(scaled) > 1:
        add("1b. The same with alpha/r fixed (ours)", *rises(sorted(scaled, key=lambda p: p.value)))
    twins = {p.value: p for p in scaled}
    for p in rank:
        if p.value in twins and twins[p.value].accuracy - p.accuracy > APART:
            lines.append(("", "", f"At r = {p.value} alpha = 32 is a scale of {32 / p.value:g}, "
                          "for which the rate of all runs here is too large: see 1b."))  # fmt: skip
    if len(public) > 1:
        add("2. Logits: the server's accuracy rises with the public set", *rises(public))
    if len(samples) > 1:
        add("3. Activations: accuracy rises with the training rows", *rises(samples))
    if rank and public and samples:
        best = {"parameters": max(p.accuracy for p in rank),
                "logits": max(p.accuracy for p in public),
                "activations": max(p.accuracy for p in samples)}  # fmt: skip
        said = ", ".join(f"{name} {value:.1%}" for name, value in best.items())
        for p in rank:
            if p.value == MIDDLE:
                said += f"; with r = {MIDDLE}, as the others have, parameters {p.accuracy:.1%}"
        first = max(best, key=lambda name: best[name])
        add("4. Parameters reach the highest accuracy", first == "parameters", said)
    if len(rank) > 1:
        lora = [(p.value, p.roles["parameter"]) for p in rank]
        step = (lora[-1][1] - lora[0][1]) / (lora[-1][0] - lora[0][0])
        head = lora[0][1] - step * lora[0][0]
        exact = all(abs(size - head - step * value) < 1 for value, size in lora)
        flat = max(p.flops for p in rank) / min(p.flops for p in rank) - 1
        add("5a. Parameters: bytes of LoRA are proportional to the rank", exact,
            f"{step:,.0f} bytes up x r {'exactly' if exact else 'on average'}; the head adds "
            f"{head:,.0f} bytes whatever the rank, which the paper does not mention")  # fmt: skip
        add("5b. Parameters: computation is nearly flat in the rank", flat < FLAT,
            f"FLOPs differ by {flat:.1%}")  # fmt: skip
    if len(public) > 1:
        add(
            "6a. Logits: bytes are proportional to the public set",
            *proportional(public, lambda p: p.roles["logit"], 0.001),
        )
        add(
            "6b. Logits: computation is proportional to the public set",
            *proportional(public, lambda p: p.flops, NEARLY, "FLOP"),
        )
        add("6c. Logits: the largest computation", *largest("flops", public, rank, samples))
    if len(samples) > 1:
        add(
            "7a. Activations: bytes are proportional to the training rows",
            *proportional(samples, lambda p: p.roles["activation"], NEARLY),
        )
        add(
            "7b. Activations: computation is proportional to the training rows",
            *proportional(samples, lambda p: p.flops, NEARLY, "FLOP"),
        )
        add("7c. Activations: the most bytes", *largest("bytes", samples, rank, public))
    return lines


# table I ----------------------------------------------------------------------------------------


MIDDLE = 8  # the rank that stands for parameters in table I


def stars(found: dict[str, list[Point]]) -> list[list[str]]:
    """
    Table I from measured values, at the largest public set and all training rows.

    Accuracy: five for the best, one less for each 3 points begun behind it. Bytes: five for the
    most, one less for each factor of 4 begun below. FLOPs: the same for each factor of 1.5.
    """
    chosen = {
        "parameters": next(p for p in found["rank"] if p.value == MIDDLE),
        "logits": found["public"][-1], "activations": found["samples"][-1],
    }  # fmt: skip
    best = max(p.accuracy for p in chosen.values())
    most, work = (max(getattr(p, n) for p in chosen.values()) for n in ("bytes", "flops"))
    lines = []
    for name, p in chosen.items():
        ours = (
            5 - math.ceil((best - p.accuracy) / 0.03 - 1e-9),
            5 - math.ceil(math.log(most / p.bytes, 4) - 1e-9),
            5 - math.ceil(math.log(work / p.flops, 1.5) - 1e-9),
        )
        cells = [f"{max(o, 1)} ({t})" for o, t in zip(ours, PAPER[name], strict=True)]
        measured = [f"{p.accuracy:.1%}", tables.size(p.bytes), f"{p.flops / 1e9:,.0f} G"]
        lines.append([name, *(f"{c}: {m}" for c, m in zip(cells, measured, strict=True))])
    return lines


def break_even(found: dict[str, list[Point]]) -> str:
    """Public rows below which logits send less than parameters, from the actual payload."""
    logit = found["public"][-1]
    row = logit.roles["logit"] / logit.value
    rank = [p for p in found["rank"] if not p.scaled]
    even = {p.value: p.roles["parameter"] / row for p in rank}
    said = ", ".join(f"{rows:,.0f} at r = {value}" for value, rows in even.items())
    dearer = [value for value, rows in even.items() if logit.value > rows]
    verdict = (
        f"With {logit.value:,} public rows they send more at r = {', '.join(map(str, dearer))}: "
        "that logits are always cheapest for classification, as the paper says, does not hold."
        if dearer
        else f"With {logit.value:,} public rows they send less at every rank, as the paper says."
    )
    return (
        f"A public row costs {row:,.0f} bytes of logits. So logits send less than parameters (head "
        f"included) only below this many public rows a round: {said}. {verdict}"
    )


def padded(found: dict[str, list[Point]]) -> str:
    """Activations as sent and as they would be with every row padded to 80."""
    last = found["samples"][-1]
    width = 384
    whole = last.value * PAD * width * FLOAT
    return (
        f"Activations are sent without padding: {tables.size(last.roles['activation'])} up a "
        f"client and round with {last.value} rows; padded to {PAD} tokens, as in the paper, it "
        f"would be {tables.size(whole)}."
    )


# pictures and files -----------------------------------------------------------------------------


def draw(found: dict[str, list[Point]], bounds: dict[str, float], folder: Path) -> None:
    """Figures 3 (accuracy) and 4 (bytes and FLOPs of a client and round), panels side by side."""
    for name, fill in (("accuracy", _accuracy), ("costs", _costs)):
        figure = Figure(figsize=(3.7 * len(found), 3.2), layout="constrained")
        panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for axes, (grid, points_) in zip(panels, found.items(), strict=True):
            _, label, title, colour = GRIDS[grid]
            fill(axes, grid, points_, colour, bounds)
            axes.set_xticks(sorted({p.value for p in points_}))
            axes.set_xlabel(label)
            axes.set_title(title, fontsize=10)
            axes.grid(True, alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel({"accuracy": "accuracy, %", "costs": "of a client and round"}[name])
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _accuracy(
    axes: Any, grid: str, listed: list[Point], colour: str, bounds: dict[str, float]
) -> None:
    """Mean and standard deviation of the seeds; the ranks in both ways of scaling."""
    plain = [p for p in listed if not p.scaled]
    lines = [("alpha = 32", "-", plain)]
    if grid == "rank":
        scaled = sorted((p for p in listed if p.scaled or p.value == MIDDLE), key=lambda p: p.value)
        lines.append(("alpha / r = 4", ":", scaled))
    for label, style, some in lines:
        axes.errorbar(
            [p.value for p in some], [100 * p.accuracy for p in some],
            [100 * p.spread for p in some], color=colour, marker="o", capsize=3,
            linestyle=style, label=label,
        )  # fmt: skip
    if grid == "rank":
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_ylim(LOWEST, 93)
    for p in listed:
        if 100 * p.accuracy < LOWEST:  # it would press all others together
            axes.annotate(f"{p.accuracy:.1%}", (p.value, LOWEST), xytext=(5, 8), fontsize=8,
                          textcoords="offset points", color=colour)  # fmt: skip
    for bound, value in bounds.items():
        axes.axhline(100 * value, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(bound, (0.02, 100 * value), xycoords=("axes fraction", "data"), fontsize=7,
                      va="bottom")  # fmt: skip


def _costs(
    axes: Any, grid: str, listed: list[Point], colour: str, bounds: dict[str, float]
) -> None:
    """MB of both directions and GFLOPs, on one logarithmic axis."""
    plain = [p for p in listed if not p.scaled]
    values = [p.value for p in plain]
    axes.plot(values, [p.bytes / 1e6 for p in plain], color=colour, marker="o", label="MB")
    axes.plot(values, [p.flops / 1e9 for p in plain], color=colour, marker="s", linestyle="--",
              label="GFLOP")  # fmt: skip
    axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False)


def write_csv(found: dict[str, list[Point]], folder: Path) -> None:
    """Every point and seed, for whoever draws it otherwise."""
    with (folder / "study.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["grid", "value", "alpha/r fixed", "seed", "accuracy", "bytes up",
                         "bytes down", "client FLOPs"])  # fmt: skip
        for grid, listed in found.items():
            for p in listed:
                for seed, accuracy in zip(p.seeds, p.accuracies, strict=True):
                    writer.writerow([grid, p.value, p.scaled, seed, accuracy, round(p.up),
                                     round(p.down), round(p.flops)])  # fmt: skip


def page(found: dict[str, list[Point]], bounds: dict[str, float]) -> str:
    """README.md of the study."""
    seeds = {grid: list(listed[0].seeds) for grid, listed in found.items()}
    lines = [
        "# The paper's case study, at CPU scale", "",
        "Made by `make paper` (`fedllm sweep experiments/study/<grid>.toml --jobs 2`, then",
        "`scripts/study.py`): MiniLM (22.7 M, real weights), Banking77, three clients, LoRA on",
        "query and value of the last two of six blocks, 6 rounds instead of 100. The same study at",
        "the paper's own size is `experiments/paper/`. Costs are of a client and round, evaluation",
        "left out; what lies below the trained blocks is computed once, and in the mean.", "",
        "The rate (0.003) was chosen on held-out training rows with another seed, for r = 8; the",
        "grids were fixed before the first run.", "",
        "Complete runs: " + ", ".join(f"{grid} seeds {s}" for grid, s in seeds.items()) + ".", "",
        "## Trends (catalogue row F-05)", "",
        tables.markdown(["the paper", "here", "numbers"], trends(found)), "",
        "![accuracy](accuracy.svg)", "", "![costs](costs.svg)", "",
    ]  # fmt: skip
    if bounds:
        said = ", ".join(f"{name} {value:.1%}" for name, value in bounds.items())
        lines += [f"Bounds with the same settings: {said}.", ""]
    ready = any(p.value == MIDDLE for p in found.get("rank", []))
    if ready and all(found.get(grid) for grid in GRIDS):
        header = ["", "accuracy: ours (paper)", "bytes", "client's FLOPs"]
        rule = " ".join((stars.__doc__ or "").split("\n\n")[1].split())
        lines += [
            "## Table I, measured", "", tables.markdown(header, stars(found)), "",
            f"Stars, more for more of it. Our rule: {rule} In brackets the paper's.", "",
            "## Break-even, and what padding would cost", "", break_even(found), "",
            padded(found), "",
        ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Read what is there and write the pages."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = {grid: points(runs / grid, key) for grid, (key, *_) in GRIDS.items()}
    found = {grid: listed for grid, listed in found.items() if listed}
    if not found:
        raise FedllmError(f"{runs}: no finished runs here; 'make paper' makes them")
    bounds = {}
    for path in (runs / "bounds").glob("strategy=*"):
        values = [read(one.parent)["metrics"]["accuracy"] for one in path.glob("*/summary.json")]
        if values:
            bounds[path.name.partition("=")[2]] = statistics.fmean(values)
    out.mkdir(parents=True, exist_ok=True)
    draw(found, bounds, out)
    write_csv(found, out)
    (out / "README.md").write_text(page(found, bounds))


if __name__ == "__main__":
    try:
        main()
    except FedllmError as error:
        sys.exit(f"error: {error}")
