"""Finished sweeps side by side: what the pages of the studies share."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fedllm import experiment as ex
from fedllm import sweep
from fedllm.compare import read
from fedllm.errors import FedllmError
from fedllm.report import tables

NAN = float("nan")


@dataclass(frozen=True)
class Line:
    """
    One point of a grid: what it sets, and what came of it.

    server, clients: accuracy of the server's model and the clients' mean, one value a seed; NaN
    where there is no model. The rest are means over the seeds. up, down: bytes of a client and
    round; flops: of the same; seconds: of the server and a round; gap: the last round's relative
    distance to the mean of the products (NaN where there is none).
    """

    label: str
    seeds: tuple[int, ...]
    server: tuple[float, ...]
    clients: tuple[float, ...]
    up: float
    down: float
    flops: float
    seconds: float
    gap: float

    @property
    def bytes(self) -> float:
        """Both ways."""
        return self.up + self.down


Column = tuple[str, Callable[[Line, Line], str]]  # of a line and the first of its grid


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        between = "; " if any(isinstance(one, Mapping) for one in value) else "/"
        return between.join(map(_word, value)) or "none"
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_word(one)}" for key, one in value.items())
    return str(value).lower() if isinstance(value, bool) else Path(str(value)).name


def _said(key: str, value: Any, plain: Any) -> list[str]:
    """A setting in words; of a table, what is otherwise than in the first point's."""
    if key == "kind":
        return [_word(value)]
    short = key.rpartition(".")[2]
    if not isinstance(value, Mapping):
        return [f"{short} {_word(value)}"]
    if value and all(str(name).isdigit() for name in value):
        return [f"{short} " + "/".join(f"{name}:{one}" for name, one in value.items())]
    told = plain if isinstance(plain, Mapping) and plain != value else {}
    said = [part for name, one in value.items() if one != told.get(name)
            for part in _said(name, one, told.get(name))]  # fmt: skip
    left = ", ".join(name for name in told if name not in value)
    gone = [f"{short} without {left}"] if left else []
    if said and not isinstance(plain, Mapping):
        said[0] = f"{short} {said[0]}"
    return said + gone or [f"{short} none"]


def label(settings: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """What a point sets otherwise than the first; the first: its first setting."""
    other = {key: value for key, value in settings.items() if value != plain[key]}
    first = next(iter(settings))
    shown = other or {first: settings[first]}
    return ", ".join(part for key, value in shown.items() for part in _said(key, value, plain[key]))


def _quality(run: Mapping[str, Any], of: str) -> float:
    found = run.get(of)
    return float(found["accuracy"]) if found else NAN


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
        label(point.settings, first.settings),
        tuple(int(run["seed"]) for run in runs),
        tuple(_quality(run, "global") for run in runs),
        tuple(_quality(run, "mean") for run in runs),
        statistics.fmean(cost["bytes_up"] for cost in costs),
        statistics.fmean(cost["bytes_down"] for cost in costs),
        statistics.fmean(cost["flops"] for cost in costs),
        statistics.fmean(_seconds(run) for run in runs),
        statistics.fmean(run["history"][-1].get("product_gap", NAN) for run in runs),
    )


def _seconds(run: Mapping[str, Any]) -> float:
    """Of the server and a round; none of a bound, which has no server."""
    server = run["costs"].get("server")
    return server["seconds"] / run["rounds"] if server else NAN


def spread(values: Sequence[float], show: str = ".1f") -> str:
    """Mean and standard deviation in points; a dash where there is none."""
    if any(value != value for value in values):
        return "-"
    mean = f"{100 * statistics.fmean(values):{show}}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def gaps(mine: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """By how much mine is better, seed by seed."""
    return tuple(a - b for a, b in zip(mine, other, strict=True))


def column(title: str, of: str) -> Column:
    """A quality: ``server`` or ``clients``."""
    return title, lambda line, _: spread(getattr(line, of))


def gain(title: str, of: str) -> Column:
    """The same over the first line, seed by seed, in points."""
    return (
        title,
        lambda line, plain: (
            "" if line is plain else spread(gaps(getattr(line, of), getattr(plain, of)), "+.1f")
        ),
    )


def _ratio(value: float) -> str:
    return f"{value:.2f} x" if 0.1 <= value < 100 else f"{value:.2g} x"


def times(title: str, of: str, show: Callable[[float], str] = tables.size) -> Column:
    """A cost: of the first line itself, of the others how many times that."""
    return title, lambda line, plain: (
        show(getattr(line, of)) if line is plain
        else _ratio(getattr(line, of) / getattr(plain, of))
    )  # fmt: skip


def table(
    found: Mapping[str, list[Line]], titles: Mapping[str, str], columns: Sequence[Column]
) -> str:
    """All grids, one block of lines each."""
    listed = []
    for grid, some in found.items():
        seeds = ", ".join(map(str, some[0].seeds))
        listed.append([f"**{titles[grid]}**, seeds {seeds}", *[""] * len(columns)])
        listed += [[line.label, *(show(line, some[0]) for _, show in columns)] for line in some]
    return tables.markdown(["", *(title for title, _ in columns)], listed)


def verdict(what: str, gap: Sequence[float]) -> list[str]:
    """A claim of the catalogue beside what was measured."""
    mean = statistics.fmean(gap)
    noise = statistics.stdev(gap) if len(gap) > 1 else float("inf")
    holds = "holds" if mean > 0 else "**does not hold**"
    if abs(mean) <= noise:
        holds += ", within the spread of the seeds" if len(gap) > 1 else ", one seed"
    return [what, holds, f"{spread(gap, '+.1f')} points, {sum(g > 0 for g in gap)} of {len(gap)}"]


def front(some: Sequence[Line], of: str = "bytes") -> list[Line]:
    """Those than which no other is both cheaper and better, the cheapest first."""
    found: list[Line] = []
    for line in sorted(some, key=lambda line: (getattr(line, of), -statistics.fmean(line.server))):
        if not found or statistics.fmean(line.server) > statistics.fmean(found[-1].server):
            found.append(line)
    return found


def scatter(
    axes: Axes, some: Sequence[Line], ticks: Sequence[float], unit: float = 1e3,
    of: str = "bytes", markers: Sequence[str] = "",
) -> None:  # fmt: skip
    """Accuracy of the server against a cost, each line with its spread; dashed: the front."""
    best = front(some, of)
    axes.plot([getattr(line, of) / unit for line in best],
              [100 * statistics.fmean(line.server) for line in best],
              color="#888888", linestyle="--", linewidth=1, drawstyle="steps-post")  # fmt: skip
    for number, line in enumerate(some):
        values = [100 * value for value in line.server]
        axes.errorbar(
            getattr(line, of) / unit, statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else 0,
            color=f"C{number % 10}", markersize=5, capsize=3, linestyle="none", label=line.label,
            marker=markers[number] if markers else "os"[number // 10 % 2],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(ticks[0], 1.3 * ticks[-1])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if some:
        axes.legend(fontsize=7, frameon=False, loc="upper center", ncols=2,
                    bbox_to_anchor=(0.5, -0.13))  # fmt: skip


def command(
    usage: str | None, target: str, grids: Iterable[str],
    write: Callable[[dict[str, list[Line]], Path, Path], None],
) -> None:  # fmt: skip
    """
    A study's command, with the folder of the runs and that of its page.

    target: of make, which makes the runs.  write: the page, from the grids that have lines, the
    folder of the runs and its own.
    """
    if len(sys.argv) != 3:
        sys.exit(usage)
    runs, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        found = {grid: some for grid in grids if (some := lines(runs / grid))}
        if not found:
            raise FedllmError(f"{runs}: no finished runs here; 'make {target}' makes them")
        out.mkdir(parents=True, exist_ok=True)
        write(found, runs, out)
    except FedllmError as error:
        sys.exit(f"error: {error}")


def write_csv(found: Mapping[str, list[Line]], path: Path) -> None:
    """Every point and seed, for whoever draws it otherwise."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["grid", "point", "seed", "server", "clients", "bytes up", "bytes down",
                         "client FLOPs", "server seconds", "product gap"])  # fmt: skip
        for grid, some in found.items():
            for line in some:
                for seed, server, clients in zip(
                    line.seeds, line.server, line.clients, strict=True
                ):
                    writer.writerow([grid, line.label, seed, server, clients, round(line.up),
                                     round(line.down), round(line.flops),
                                     round(line.seconds, 4), round(line.gap, 4)])  # fmt: skip
