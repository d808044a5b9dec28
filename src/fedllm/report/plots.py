"""Pictures of a summary, as SVG text."""

from __future__ import annotations

import io
import re
from typing import Any

PRIMARY = {"classification": ("accuracy", "accuracy"), "generation": ("bits_per_byte", "bits/byte")}
COLOURS = {
    "parameters": "#4477aa", "logits": "#cc6677", "activations": "#228833",
    "centralized": "#888888", "standalone": "#bbbbbb", "standalone-equal-steps": "#aa8855",
    "public-only": "#66ccee",
}  # fmt: skip


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight",
                   transparent=True)  # fmt: skip
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)  # links to nowhere needed
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25)
    return figure, axes


def quality(summary: dict[str, Any]) -> str:
    """Quality over rounds, one line a run (mean of seeds); empty if only one was evaluated."""
    key, title = PRIMARY[summary["task"]]
    curves = _curves(summary, key)
    if all(len(points) < 2 for points in curves.values()):
        return ""
    figure, axes = _figure(6.4, 3.6)
    for name, points in curves.items():
        bound = name not in ("parameters", "logits", "activations")
        axes.plot(
            *zip(*points, strict=True), label=name, color=COLOURS.get(name),
            linestyle="--" if bound else "-", marker="o", markersize=3,
        )  # fmt: skip
    axes.set_xlabel("round")
    axes.set_ylabel(title)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def _curves(summary: dict[str, Any], key: str) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, run in (summary.get("parts") or {summary["strategy"]: summary}).items():
        if run.get("same_as"):
            continue
        histories = run["history"] if "parts" in summary else [run["history"]]
        sums: dict[int, list[float]] = {}
        for history in histories:
            for entry in history:
                found = entry.get("metrics") or entry.get("global") or entry.get("mean")
                if found:
                    sums.setdefault(entry["round"], []).append(found[key])
        if sums:
            curves[name] = [(r, sum(v) / len(v)) for r, v in sorted(sums.items())]
    return curves


def trade_off(summary: dict[str, Any]) -> str:
    """Quality against bytes of a client and round (both directions; logarithmic)."""
    key, title = PRIMARY[summary["task"]]
    figure, axes = _figure(6.4, 3.6)
    for name, run in (summary.get("parts") or {}).items():
        cost = run["per_client_round"]
        moved = cost["bytes_up"]["mean"] + cost["bytes_down"]["mean"]
        value = run["metrics"][key]["mean"]
        if name in ("parameters", "logits", "activations"):
            axes.scatter(moved / 1e6, value, s=60, color=COLOURS[name], label=name, zorder=3)
        elif not run.get("same_as"):
            axes.axhline(value, color=COLOURS.get(name), linestyle="--", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("MB a client and round, up and down")
    axes.set_ylabel(title)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)
