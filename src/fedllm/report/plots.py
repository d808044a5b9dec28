"""Pictures of a summary, as SVG text or PNG bytes."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PRIMARY = {
    "classification": ("accuracy", "accuracy"),
    "generation": ("bits_per_byte", "bits/byte"),
    "multiple-choice": ("accuracy", "accuracy"),
    "preference": ("accuracy", "accuracy"),
}
STRATEGIES = ("parameters", "logits", "activations")
COLOURS = {
    "parameters": "#4477aa", "logits": "#cc6677", "activations": "#228833",
    "centralized": "#888888", "standalone": "#aa5599", "standalone-equal-steps": "#aa8855",
    "public-only": "#33a1c9",
}  # fmt: skip
# Paul Tol's muted scheme without its palest
OTHERS = ("#4477aa", "#cc6677", "#228833", "#aa8855", "#33a1c9", "#882255", "#999933", "#44aa99",
          "#8877cc", "#888888")  # fmt: skip
MARKERS = "osD^vP*Xp<"
WIDTH, CURVES, PANEL = 4.9, 4.6, 3.0  # inches
_FONTS = {"svg.fonttype": "none", "font.size": 10.5, "legend.fontsize": 9, "axes.labelsize": 10,
          "svg.hashsalt": "fedllm"}  # fmt: skip
_INK = "#010203"  # drawn by what does not say a colour; becomes the page's own


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_FONTS):
        figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight",
                       transparent=True)  # fmt: skip
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)  # links to nowhere needed
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _figure(rows: int, height: float) -> tuple[Any, list[Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color",
                         "ytick.color"), _INK)  # fmt: skip
    with matplotlib.rc_context({**_FONTS, **ink}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        found = figure.subplots(rows, squeeze=False)[:, 0]
        for axes in found:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, alpha=0.3)
    return figure, list(found)


def _legend(figure: Any, axes: Any, names: Iterable[str]) -> None:
    """Below the axes, in as many columns as the names leave room for."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in map(_label, names) if label in named]
    handles = [named[name] for name in labels]
    longest = max(map(len, labels), default=1)
    figure.legend(
        handles, labels, loc="outside lower left", frameon=False, labelcolor=_INK, fontsize=9,
        ncols=max(1, min(3, 66 // (longest + 6))), borderaxespad=0, columnspacing=1.2,
    )  # fmt: skip


def _label(name: str) -> str:
    """A name that matplotlib shows: what begins with an underscore it hides."""
    return f"\u200b{name}" if name.startswith("_") else name


def parts_of(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs of a summary by name; a bound that repeats another is left out."""
    runs = summary.get("parts") or {summary["strategy"]: summary}
    return {name: run for name, run in runs.items() if not run.get("same_as")}


def styles(names: Sequence[str], runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What each line looks like: colour, marker, and dashes for a bound."""
    own = all(name in COLOURS for name in names)
    return {
        name: {
            "color": COLOURS[name] if own else OTHERS[number % len(OTHERS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": "-" if runs[name]["strategy"] in STRATEGIES else "--",
        }
        for number, name in enumerate(names)
    }


def title_of(summary: Mapping[str, Any]) -> tuple[str, str, float]:
    """(metric, its title on an axis, what to multiply it with)."""
    key, title = PRIMARY[summary["task"]]
    return (key, f"{title} (%)", 100) if key == "accuracy" else (key, title, 1)


def quality(summary: dict[str, Any]) -> str:
    """
    Quality over rounds, one line a run: the mean of seeds, and one standard deviation around it.

    Empty if only one round was evaluated.
    """
    figure = _curves_figure(summary)
    return "" if figure is None else _svg(figure)


def _curves_figure(summary: dict[str, Any], height: float = CURVES) -> Any:
    key, title, factor = title_of(summary)
    found = curves(summary, key)
    if all(len(points) < 2 for points in found.values()):
        return None
    figure, (axes,) = _figure(1, height)
    look = styles(list(found), parts_of(summary))
    for name, points in found.items():
        rounds, values = [point[0] for point in points], [point[1] * factor for point in points]
        axes.plot(rounds, values, label=_label(name), markersize=4, **look[name])
        if any(point[2] for point in points):
            spread = [point[2] * factor for point in points]
            low = [v - s for v, s in zip(values, spread, strict=True)]
            high = [v + s for v, s in zip(values, spread, strict=True)]
            axes.fill_between(rounds, low, high, color=look[name]["color"], alpha=0.15, lw=0)
    axes.set_xlabel("round")
    axes.set_ylabel(title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes, found)
    return figure


def curves(summary: dict[str, Any], key: str) -> dict[str, list[tuple[int, float, float]]]:
    """{run: [(round, mean over seeds, standard deviation)]} of the rounds that were evaluated."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for name, run in parts_of(summary).items():
        histories = run["history"] if "parts" in summary else [run["history"]]
        values: dict[int, list[float]] = {}
        for history in histories:
            for entry in history:
                metrics = entry.get("metrics") or entry.get("global") or entry.get("mean")
                if metrics and key in metrics:
                    values.setdefault(entry["round"], []).append(metrics[key])
        if values:
            found[name] = [
                (r, statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0)
                for r, v in sorted(values.items())
            ]
    return found


COST_AXES = {"bytes": ("MB a client and round, up and down", 1e6),
             "flops": ("GFLOPs a client and round", 1e9)}  # fmt: skip


def cost(run: Mapping[str, Any], kind: str) -> float:
    """A run's mean cost a client and round: ``bytes`` of both directions, or ``flops``."""
    costs = run["per_client_round"]
    names = ("bytes_up", "bytes_down") if kind == "bytes" else ("flops",)
    values = [costs.get(name, 0) for name in names]
    return float(sum(v["mean"] if isinstance(v, dict) else v for v in values))


def trade_off(summary: dict[str, Any], *kinds: str) -> str:
    """
    Quality against costs of a client and round (logarithmic), one picture over the other.

    kinds: of ``COST_AXES``; bytes without any.
    """
    return _svg(_trade_off_figure(summary, kinds or ("bytes",)))


def _trade_off_figure(summary: dict[str, Any], kinds: Sequence[str]) -> Any:
    figure, panels = _figure(len(kinds), PANEL * len(kinds) + 0.5)
    for kind, axes in zip(kinds, panels, strict=True):
        _scatter(summary, kind, axes)
    _legend(figure, panels[0], parts_of(summary))
    return figure


def _scatter(summary: dict[str, Any], kind: str, axes: Any) -> None:
    key, title, factor = title_of(summary)
    label, unit = COST_AXES[kind]
    runs = {n: r for n, r in parts_of(summary).items() if key in r["metrics"]}
    look = styles(list(runs), runs)
    axes.set_xscale("log")
    for name, run in runs.items():
        entry = run["metrics"][key]
        mean, sd = (entry["mean"], entry["sd"]) if isinstance(entry, dict) else (entry, 0.0)
        colour = look[name]["color"]
        if run["strategy"] in STRATEGIES:
            axes.errorbar(
                max(cost(run, kind), 1) / unit, mean * factor, yerr=sd * factor or None,
                fmt=look[name]["marker"], color=colour, markersize=8, label=_label(name), zorder=3,
                capsize=3,
            )  # fmt: skip
        else:
            axes.axhline(mean * factor, color=colour, linestyle="--", label=_label(name))
    _plain_ticks(axes.xaxis)
    axes.set_xlabel(label)
    axes.set_ylabel(title)


MOST = 12  # runs in a picture of roles; a table has them all


def roles(found: Sequence[tuple[str, str, str, float]]) -> str:
    """
    Bytes by direction and role, a line for each run and direction, on a logarithmic axis.

    found: (run, direction, role, bytes). Runs that send but headers are left out. Empty where no
    other is left, or runs are too many.
    """
    runs = list(dict.fromkeys(run for run, _, role, size in found if size and role != "header"))
    found = [one for one in found if one[0] in runs]
    if not 0 < len(runs) <= MOST:
        return ""
    rows = [(run, way) for run in runs for way in ("up", "down")]
    kinds = list(dict.fromkeys(role for _, _, role, size in found if size))
    figure, (axes,) = _figure(1, 0.9 + 0.27 * len(rows))
    for number, kind in enumerate(kinds):
        mine = [(size / 1e6, rows.index((run, way))) for run, way, role, size in found
                if role == kind and size]  # fmt: skip
        axes.plot(
            *zip(*mine, strict=True), linestyle="", marker=MARKERS[number % len(MARKERS)],
            color=OTHERS[number % len(OTHERS)], label=_label(kind), markersize=7,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{_short(run)}, {way}" for run, way in rows])
    axes.invert_yaxis()
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("MB a client and round")
    _legend(figure, axes, kinds)
    return _svg(figure)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:21]}..."


def _plain_ticks(axis: Any) -> None:
    """Numbers as one writes them, and 2 and 5 between the powers where these are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = FuncFormatter(lambda value, _: f"{value:,.10g}")
    low, high = axis.get_view_interval()
    axis.set_major_formatter(shown)
    few = high / low < 50
    axis.set_minor_locator(LogLocator(subs=(2, 3, 5) if few else range(2, 10)))
    axis.set_minor_formatter(shown if few else NullFormatter())


def png(summary: dict[str, Any]) -> bytes:
    """Both pictures as one PNG."""
    import numpy as np
    from matplotlib import image

    both = _trade_off_figure(summary, ("bytes", "flops"))
    figures = [_curves_figure(summary, both.get_figheight()), both]
    arrays = []
    for figure in figures:
        if figure is not None:
            out = io.BytesIO()
            figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
            figure.savefig(out, format="png", dpi=160, facecolor="white")
            arrays.append(image.imread(io.BytesIO(out.getvalue())))
    height = max(array.shape[0] for array in arrays)
    padded = [np.pad(a, ((0, height - a.shape[0]), (0, 0), (0, 0)), constant_values=1.0)
              for a in arrays]  # fmt: skip
    out = io.BytesIO()
    image.imsave(out, np.concatenate(padded, axis=1), format="png")
    return out.getvalue()
